"""Sets of features to remove: the bands, and what a band is compared with.

A band differs from the rest in how often its features fire and how much they write. So each is set beside a random set of
equal size, and beside features outside it that are as energetic and as frequent, one to one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability.matching import BANDS, Stability
from sae_stability.statistics import matched_pairs

CALIPER = 0.2  # standard deviations of log energy and of log frequency by which two matched features may differ
SHARES = (0.25, 0.5, 0.75)  # of the live features, along the cumulative curves
ORDERS = ("stability", "energy", "frequency", "random")
CURVE_SEEDS = 4  # the first seeds, whose features are added in those orders: each point costs a pass of the model for each

Name = tuple[str, str]
"""Which set: (kind of set, band), or (`by` an order, share of the live features)."""


@dataclass(frozen=True)
class Sets:
    """Sets of features of each seed."""

    members: dict[Name, Bool[Tensor, "seed d_sae"]]
    """`band`, `random` (as many), `paired` (the band's features that have a match outside it) and `matched` (those matches); and
    `by` each order, of the first `CURVE_SEEDS` only."""
    support: dict[str, Float[np.ndarray, "seed"]]
    """The share of each band's energy that is in `paired` features; NaN where the band is empty."""

    def mean_support(self, band: str) -> float:
        """Of the seeds that have such a band; 0 where none has."""
        known = self.support[band][np.isfinite(self.support[band])]
        return float(known.mean()) if len(known) else 0.0


def sets_of(
    found: Stability, energy: Float[Tensor, "seed d_sae"], firings: Float[Tensor, "seed d_sae"], curves: bool = True
) -> Sets:
    """The sets of an ensemble: all live features, its bands and their controls, and the first features in several orders.

    A live feature may fire on none of the tokens at hand. It has no logarithms, so it is nobody's match and no part of the caliper.
    """
    alive, generator = found.alive, np.random.default_rng(0)
    members: dict[Name, Tensor] = {("all", ""): alive}
    support = {}
    fires = (alive & (energy > 0)).numpy()
    covariates = torch.stack([energy.clamp_min(1e-30).log(), firings.clamp_min(1e-30).log()], 2).double().numpy()
    for number, band in enumerate(BANDS):
        inside = torch.from_numpy(found.band == number)
        members["band", band] = inside
        members["random", band], members["paired", band], members["matched", band] = (torch.zeros_like(inside) for _ in range(3))
        support[band] = np.full(len(alive), np.nan)
        for seed, living in enumerate(alive):
            members["random", band][seed, generator.permutation(living.nonzero()[:, 0].numpy())[: int(inside[seed].sum())]] = True
            of_band = inside[seed].numpy()
            within, outside = np.flatnonzero(fires[seed] & of_band), np.flatnonzero(fires[seed] & ~of_band)
            spread = covariates[seed, fires[seed]].std(0)
            one, other = matched_pairs(covariates[seed, within] / spread, covariates[seed, outside] / spread, CALIPER)
            members["paired", band][seed, within[one]] = True
            members["matched", band][seed, outside[other]] = True
            total = energy[seed, within].sum()
            support[band][seed] = float(energy[seed, within[one]].sum() / total) if total > 0 else np.nan
    if curves:
        members |= _cumulative(found, energy, firings, generator)
    return Sets(members, support)


def _cumulative(found: Stability, energy: Tensor, firings: Tensor, generator: np.random.Generator) -> dict[Name, Tensor]:
    """The first features of each seed in each order; ties are broken at random, so that no order smuggles in another."""
    shuffled = torch.from_numpy(generator.random(found.alive.shape))
    keys = {"stability": found.probability, "energy": energy, "frequency": firings, "random": torch.zeros_like(shuffled)}
    members = {}
    for order in ORDERS:
        key = keys[order].double().numpy()
        for share in SHARES:
            first = torch.zeros_like(found.alive[:CURVE_SEEDS])
            for seed, living in enumerate(found.alive[:CURVE_SEEDS]):
                live = living.nonzero()[:, 0].numpy()
                ranked = live[np.lexsort((shuffled[seed, live], -key[seed, live]))]
                first[seed, ranked[: round(share * len(live))]] = True
            members[f"by {order}", f"{share:g}"] = first
    return members
