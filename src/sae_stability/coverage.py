"""Do the book's intervals hold the truth as often as they say? Simulated ensembles answer, of which the truth is known.

Seeds hold directions of one universe, each with a probability of its own, or others in their place. What they share makes the
numbers of one seed depend on those of the others, as in trained SAEs: that is what an interval has to get right.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from tqdm import trange

from sae_stability.matching import Banding, Stability
from sae_stability.statistics import Interval, jackknife
from sae_stability.triggers import PARTS, TELLS, cliffs_delta, over_seeds

DIRECTIONS = 120  # of the universe, and features of a seed
CLUSTERS = 8 * PARTS  # of documents, which all seeds read
ON_TEXT = 0.02  # standard deviation over draws of the text of what the token tells of a feature, of all seeds alike


def simulated(rng: np.random.Generator, seeds: int) -> tuple[Stability, pd.DataFrame, list[pd.DataFrame]]:
    """Seeds of one universe: their stability, their features, and the features as read without each part of the text in turn.

    Frequent and energetic directions are found more often, and what a seed measures of one is not quite what another does. What
    the token tells (`explained`) is an average over documents, all of which move the features of every seed.
    """
    universe = np.random.default_rng(0)
    probability = universe.beta(0.46, 0.29, DIRECTIONS)
    size, rate, told = universe.normal(size=(3, DIRECTIONS))
    has = rng.random((seeds, DIRECTIONS)) < probability
    energy, frequency = (np.exp(of + probability + 0.3 * rng.normal(size=has.shape) - 0.5 * ~has) for of in (size, rate))
    of_seed = TELLS + 0.1 * told + 0.05 * rng.normal(size=has.shape)
    in_cluster = ON_TEXT * np.sqrt(CLUSTERS) * rng.normal(size=CLUSTERS)
    part = np.arange(CLUSTERS) % PARTS

    def explained(read: Bool[np.ndarray, "cluster"]) -> np.ndarray:
        return (of_seed + in_cluster[read].mean()).ravel()

    seed, feature = np.indices(has.shape).reshape(2, -1)
    columns = {"seed": seed, "feature": feature, "energy": energy.ravel(), "frequency": frequency.ravel()}
    table = pd.DataFrame(columns).assign(explained=explained(part >= 0))
    parts = [table.assign(explained=explained(part != left_out)) for left_out in range(PARTS)]
    return of_matches(has[:, None] & has[None], np.ones_like(has)), table, parts


def of_matches(matched: Bool[np.ndarray, "seed seed d_sae"], alive: Bool[np.ndarray, "seed d_sae"]) -> Stability:
    """The stability of which [s, t, i] of `matched` holds whether feature i of seed s comes back in seed t."""
    cosine = np.where(matched, 1.0, 0.0)
    cosine[np.eye(len(cosine), dtype=bool)] = np.nan
    cosine[np.broadcast_to(~alive[:, None], cosine.shape)] = np.nan
    best = torch.from_numpy(cosine).float()
    return Stability(best, torch.zeros(best.shape, dtype=torch.int64), best, torch.from_numpy(alive), 0.7)


def _stable_share(table: pd.DataFrame) -> float:
    return float((table["band"] == "stable").mean())


def _mean_energy(table: pd.DataFrame) -> float:
    return float(table.loc[table["band"] == "unstable", "energy"].mean())


def _energy_share(table: pd.DataFrame) -> float:
    return float(table.loc[table["band"] == "stable", "energy"].sum() / table["energy"].sum())


def _delta(table: pd.DataFrame) -> float:
    return over_seeds(table, lambda own: cliffs_delta(own, "frequency"))


def _told_share(table: pd.DataFrame) -> float:
    return float((table.loc[table["band"] == "unstable", "explained"] >= TELLS).mean())


ON_THE_TEXT = "share of unstable features of surface form"
STATISTICS: dict[str, Callable[[pd.DataFrame], float]] = {
    "share of features that are stable": _stable_share,
    "mean energy of an unstable feature": _mean_energy,
    "share of the energy that is stable": _energy_share,
    "Cliff's delta of frequency": _delta,
    ON_THE_TEXT: _told_share,
}
"""Kinds of numbers that depend on bands."""


def coverage(seeds: int, draws: int) -> pd.DataFrame:
    """How often the nominal 95 % interval of each of `STATISTICS` holds the truth, the mean over the draws.

    One row per statistic: seeds, draws, truth, the share `covered`, and the `width` of the interval on average.
    """
    rng, rows = np.random.default_rng(seeds), []
    found = [intervals(rng, seeds) for _ in trange(draws, desc=f"{seeds} seeds", unit="draw", disable=None)]
    for name in STATISTICS:
        of_draws = [of[name] for of in found]
        truth = float(np.mean([interval.value for interval in of_draws]))
        covered = np.mean([interval.low <= truth <= interval.high for interval in of_draws])
        width = np.mean([interval.high - interval.low for interval in of_draws])
        rows.append({"statistic": name, "seeds": seeds, "draws": draws, "truth": truth, "covered": covered, "width": width})
    return pd.DataFrame(rows)


def intervals(rng: np.random.Generator, seeds: int) -> dict[str, Interval]:
    """Each of `STATISTICS` in one simulated study."""
    stability, table, parts = simulated(rng, seeds)
    banding = Banding(stability, list(range(seeds)))

    @cache
    def banded(kept: tuple[int, ...]) -> pd.DataFrame:
        return banding.banded(table, list(kept))

    def of_seeds(statistic: Callable[[pd.DataFrame], float]) -> Interval:
        return jackknife(lambda kept: statistic(banded(tuple(kept))), seeds)

    found = {name: of_seeds(statistic) for name, statistic in STATISTICS.items() if name != ON_THE_TEXT}
    told = banding.jackknife(table, STATISTICS[ON_THE_TEXT], parts)
    return found | {ON_THE_TEXT: told}
