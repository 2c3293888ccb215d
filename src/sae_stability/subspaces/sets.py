"""Which features of a seed are compared with those of another: its bands by the seeds outside the pair, and their controls."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from jaxtyping import Float, Int

from sae_stability.matching import BANDS, Stability
from sae_stability.statistics import matched_pairs
from sae_stability.subspaces.written import Members, Written

CALIPER = 0.05
"""Standard deviations of log energy and of log frequency by which a feature and its match may differ."""

Chosen = Callable[[int, frozenset[int]], dict[str, Members]]
"""The sets of the seed at a position, where the seeds at some other positions have no say in its bands."""
SEEDS = 11
"""Seeds of an ensemble that are compared, the first ones: pairs without each other seed grow as their cube."""


def of_bands(stability: Stability, seeds: list[Written]) -> Chosen:
    """The sets of an ensemble: `unstable`, and as many `random` live features; `paired` unstable features and the stable ones that
    are their `matched`es in energy and frequency; the intermediate ones that are (`intermediate`).

    A band of a seed has as many misses, or matches, as in the whole ensemble (`Stability.band_among`). Without another seed to come
    back in, a seed has no bands and no sets.
    """
    return cache(partial(_of_bands, stability, seeds))


def of_null(null: Stability, seeds: list[Written], like: list[Written], stability: Stability) -> Chosen:
    """Sets of a null that are of the size of a model's unstable ones: `as many` of its own unstable features at random, those that
    are most like the model's in energy and frequency (`alike`), and `all` of its unstable features.

    The seed at each position is set beside the model's at the same one (`like`), whose bands leave as many seeds out.
    """
    return cache(partial(_of_null, null, seeds, like, stability))


def band_among(stability: Stability, position: int, excluded: frozenset[int]) -> Int[np.ndarray, "d_sae"]:
    """The band of each feature of a seed, by its position among BANDS, where some other seeds have no say; -1 without any."""
    kept = [other for other in range(len(stability.alive)) if other == position or other not in excluded]
    if len(kept) < 2:
        return np.full(stability.alive.shape[1], -1)
    return stability.band_among(kept)[kept.index(position)]


def covariates(written: Written) -> Float[np.ndarray, "d_sae 2"]:
    """Log energy and log frequency. What does not fire has none that is finite, and is nobody's match."""
    with np.errstate(divide="ignore"):
        return np.log(np.stack([written.energy, written.firings / written.tokens.sum()], 1))


def _of_bands(stability: Stability, seeds: list[Written], position: int, excluded: frozenset[int]) -> dict[str, Members]:
    written, generator = seeds[position], np.random.default_rng(position)
    fires = written.firings > 0
    band = np.where(fires, band_among(stability, position, excluded), -1)
    stable, intermediate, unstable = (np.flatnonzero(band == number) for number in range(len(BANDS)))
    alike = covariates(written)
    spread = alike[fires].std(0) if fires.any() else np.ones(2)
    alike = alike / np.maximum(spread, 1e-12)
    paired, matched = matched_pairs(alike[unstable], alike[stable], CALIPER)
    _, between = matched_pairs(alike[unstable], alike[intermediate], CALIPER)
    rank = generator.random(len(fires))
    living = np.flatnonzero(fires & (band >= 0))
    return {
        "unstable": unstable,
        "paired": unstable[paired],
        "matched": stable[matched],
        "intermediate": intermediate[between],
        "random": np.sort(living[np.argsort(rank[living])][: len(unstable)]),
    }


def _of_null(
    null: Stability, seeds: list[Written], like: list[Written], stability: Stability, position: int, excluded: frozenset[int]
) -> dict[str, Members]:
    written, model = seeds[position], like[position % len(like)]
    place = position % len(like)
    as_few = frozenset((place + step) % len(like) for step in range(1, len(excluded) + 1))  # a seed less leaves other bands
    real = np.flatnonzero((band_among(stability, place, as_few) == 2) & (model.firings > 0))
    unstable = np.flatnonzero((band_among(null, position, excluded) == 2) & (written.firings > 0))
    ranks = np.random.default_rng(position).random(len(written.firings))
    wanted, there = covariates(model), covariates(written)
    spread = np.maximum(wanted[model.firings > 0].std(0), 1e-12) if len(real) else np.ones(2)
    _, alike = matched_pairs(wanted[real] / spread, there[unstable] / spread, np.inf)
    return {
        "as many": np.sort(unstable[np.argsort(ranks[unstable])][: len(real)]),
        "alike": unstable[alike],
        "all": unstable,
    }
