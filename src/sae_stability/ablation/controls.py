"""Sets of features to remove: the bands, and what a band is compared with.

A band differs from the rest in how often its features fire and how much they write. So each is set beside a random set of
equal size, and beside features outside it that are as energetic and as frequent, one to one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.matching import BANDS, Stability
from sae_stability.statistics import matched_pairs

CALIPER = 0.05  # standard deviations of log energy and of log frequency by which two matched features may differ
BALANCE = 0.01  # by how much the energies of matched sets may differ, as a share, for them to be compared
SHARES = (0.25, 0.5, 0.75)  # of the live features, along the cumulative curves
ORDERS = ("stability", "energy", "frequency", "random")
CURVE_SEEDS = 4  # the first seeds, whose features are added in those orders: each point costs a pass of the model for each

Name = tuple[str, str]
"""Which set: (kind of set, band), or (`by` an order, share of the live features)."""
ALL: Name = ("all", "")
NONE: Name = ("none", "")
RETURNS: Name = ("returns", "")
"""The features that reappear in the next seed: one pair of seeds for each, which no band cuts."""


@dataclass(frozen=True)
class Sets:
    """Sets of features of each seed."""

    members: dict[Name, Bool[Tensor, "seed d_sae"]]
    """`all`; `returns` (what reappears in the next seed) and as many `random` ones; `band`, `random` (as many), `paired` (the
    band's features with a match outside it) and `matched` (those matches); `by` each order, of the first `CURVE_SEEDS` only."""


def sets_of(
    found: Stability,
    energy: Float[Tensor, "seed d_sae"],
    firings: Float[Tensor, "seed d_sae"],
    curves: bool = True,
    seeds: list[int] | None = None,
) -> Sets:
    """The sets of an ensemble: all live features, its bands and their controls, and the first features in several orders.

    With `seeds` (positions), those of a study of only these, whose bands allow as many misses (`Stability.band_among`). Random
    choices are a seed's own, whoever else is there. A live feature may fire on none of the tokens at hand. It has no logarithms,
    so it is nobody's match and no part of the caliper.
    """
    kept = list(range(len(found.alive))) if seeds is None else seeds
    alive, band = found.alive[kept], found.band_among(kept)
    energy, firings = energy[kept], firings[kept]
    ranks = own_ranks(kept, alive.shape[1])
    returns = following(found, kept)
    members: dict[Name, Tensor] = {ALL: alive, RETURNS: returns, ("random", "returns"): _random(returns, alive, ranks)}
    fires = (alive & (energy > 0)).numpy()
    covariates = torch.stack([energy.clamp_min(1e-30).log(), firings.clamp_min(1e-30).log()], 2).double().numpy()
    for number, name in enumerate(BANDS):
        inside = torch.from_numpy(band == number)
        members["band", name], members["random", name] = inside, _random(inside, alive, ranks)
        members["paired", name], members["matched", name] = torch.zeros_like(inside), torch.zeros_like(inside)
        for place in range(len(kept)):
            of_band = inside[place].numpy()
            within, outside = np.flatnonzero(fires[place] & of_band), np.flatnonzero(fires[place] & ~of_band)
            spread = np.maximum(covariates[place, fires[place]].std(0), 1e-12) if fires[place].any() else 1.0
            one, other = matched_pairs(covariates[place, within] / spread, covariates[place, outside] / spread, CALIPER)
            members["paired", name][place, within[one]] = True
            members["matched", name][place, outside[other]] = True
    if curves:
        probability = torch.where(alive, found.matched[kept][:, kept].sum(1) / max(len(kept) - 1, 1), torch.nan)
        members |= _cumulative(alive, {"stability": probability, "energy": energy, "frequency": firings}, ranks)
    return Sets(members)


def following(found: Stability, seeds: list[int] | None = None) -> Bool[Tensor, "kept d_sae"]:
    """The features of each seed that reappear in the next one, of some seeds (positions) or of all."""
    kept = list(range(len(found.alive))) if seeds is None else seeds
    return found.matched[kept, kept[1:] + kept[:1]]


def own_ranks(seeds: list[int], d_sae: int) -> Float[Tensor, "kept d_sae"]:
    """Random ranks of the features of some seeds (positions): a seed's own, whoever else is there."""
    return torch.stack([torch.from_numpy(np.random.default_rng(seed).random(d_sae)) for seed in seeds])


def some_of(
    member: Bool[Tensor, "seed d_sae"], counts: Int[Tensor, "seed"], ranks: Float[Tensor, "seed d_sae"]
) -> Bool[Tensor, "seed d_sae"]:
    """So many features of each seed's set, the first by their random ranks."""
    order = ranks.masked_fill(~member, torch.inf).argsort(1).argsort(1)
    return (order < counts[:, None]) & member


def _random(like: Bool[Tensor, "seed d_sae"], alive: Bool[Tensor, "seed d_sae"], ranks: Float[Tensor, "seed d_sae"]) -> Tensor:
    """As many live features of each seed as a set has."""
    return some_of(alive, like.sum(1), ranks)


def _cumulative(alive: Tensor, keys: dict[str, Tensor], ranks: Tensor) -> dict[Name, Tensor]:
    """The first features of each seed in each order; ties are broken at random, so that no order smuggles in another."""
    keys = {**keys, "random": torch.zeros_like(ranks)}
    members = {}
    for order in ORDERS:
        key = keys[order].double().numpy()
        for share in SHARES:
            first = torch.zeros_like(alive[:CURVE_SEEDS])
            for seed, living in enumerate(alive[:CURVE_SEEDS]):
                live = living.nonzero()[:, 0].numpy()
                ranked = live[np.lexsort((ranks[seed, live], -key[seed, live]))]
                first[seed, ranked[: round(share * len(live))]] = True
            members[f"by {order}", f"{share:g}"] = first
    return members
