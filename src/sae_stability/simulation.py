"""Do the book's intervals hold what they should as often as they say? Simulated studies answer.

Seeds hold directions of one universe, each with a probability of its own, or others in their place. What they share makes the
numbers of one seed depend on those of the others, as in trained SAEs: that is what an interval has to get right. It should hold
the average over studies of as many seeds; whether that is what a reader wants to know (bias) is another question.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from tqdm import trange

from sae_stability.matching import Banding, Stability
from sae_stability.statistics import Interval
from sae_stability.triggers import FEWEST, PARTS, TELLS, Parts, cliffs_delta, delta, over_seeds, surface_share

DIRECTIONS = 120  # of the universe, and features of a seed
CLUSTERS = 8 * PARTS  # of documents, which all seeds read
OF_ALL, OF_ONE = 0.01, 0.03  # standard deviations over texts of what the token tells: alike for all directions, and of each


def simulated(rng: np.random.Generator, seeds: int) -> tuple[Stability, pd.DataFrame, list[pd.DataFrame]]:
    """Seeds of one universe: their stability, their features, and the features as read without each part of the text in turn.

    Frequent and energetic directions are found more often, and what a seed measures of one is not quite what another does. What
    the token tells is an average over documents, which move a direction in every seed alike.
    """
    universe = np.random.default_rng(0)
    probability = universe.beta(0.46, 0.29, DIRECTIONS)
    size, rate, told = universe.normal(size=(3, DIRECTIONS))
    has = rng.random((seeds, DIRECTIONS)) < probability
    energy, frequency = (np.exp(of + probability + 0.3 * rng.normal(size=has.shape) - 0.5 * ~has) for of in (size, rate))
    of_seed = TELLS + 0.1 * told - 0.1 * probability + 0.05 * rng.normal(size=has.shape)
    alike, own = rng.normal(size=CLUSTERS), rng.normal(size=(DIRECTIONS, CLUSTERS))
    in_cluster = np.sqrt(CLUSTERS) * (OF_ALL * alike + OF_ONE * own)
    part = np.arange(CLUSTERS) % PARTS

    def read(features: pd.DataFrame, clusters: Bool[np.ndarray, "cluster"]) -> pd.DataFrame:
        token = (of_seed + in_cluster[:, clusters].mean(1)).ravel()
        return features.assign(explained_token=token, trigger=np.where(token >= TELLS, "single token", "wider context"))

    seed, feature = np.indices(has.shape).reshape(2, -1)
    columns = {"seed": seed, "feature": feature, "energy": energy.ravel(), "frequency": frequency.ravel(), "firings": FEWEST}
    features = pd.DataFrame(columns)
    without = [read(features, part != left_out) for left_out in range(PARTS)]
    return of_matches(has[:, None] & has[None], np.ones_like(has)), read(features, part >= 0), without


def of_matches(matched: Bool[np.ndarray, "seed seed d_sae"], alive: Bool[np.ndarray, "seed d_sae"]) -> Stability:
    """The stability of which [s, t, i] of `matched` holds whether feature i of seed s comes back in seed t."""
    cosine = np.where(matched, 1.0, 0.0)
    cosine[np.eye(len(cosine), dtype=bool)] = np.nan
    cosine[np.broadcast_to(~alive[:, None], cosine.shape)] = np.nan
    best = torch.from_numpy(cosine).float()
    return Stability(best, torch.zeros(best.shape, dtype=torch.int64), best, torch.from_numpy(alive), 0.7)


def _stable_share(banded: pd.DataFrame) -> float:
    return float((banded["band"] == "stable").mean())


def _mean_energy(banded: pd.DataFrame) -> float:
    return float(banded.loc[banded["band"] == "unstable", "energy"].mean())


def _energy_share(banded: pd.DataFrame) -> float:
    return float(banded.loc[banded["band"] == "stable", "energy"].sum() / banded["energy"].sum())


def _delta(banded: pd.DataFrame) -> float:
    return over_seeds(banded, lambda own: cliffs_delta(own, "frequency"))


def _over_seeds(statistic: Callable[[pd.DataFrame], float], features: pd.DataFrame, bands: Banding, parts: Parts) -> Interval:
    """An interval of what no text is read for."""
    return bands.jackknife(features, statistic)


STATISTICS: dict[str, Callable[[pd.DataFrame, Banding, Parts], Interval]] = {
    "share of features that are stable": partial(_over_seeds, _stable_share),
    "mean energy of an unstable feature": partial(_over_seeds, _mean_energy),
    "share of the energy that is stable": partial(_over_seeds, _energy_share),
    "Cliff's delta of frequency": partial(_over_seeds, _delta),
    "on text: share of unstable features of surface form": lambda features, bands, parts: surface_share(
        features, bands, "unstable", parts=parts
    ),
    "on text: Cliff's delta of what the token tells, at equal frequency": lambda features, bands, parts: delta(
        features, bands, "explained_token", equal_frequency=True, parts=parts
    ),
}
"""Kinds of numbers that depend on bands."""


def coverage(seeds: int, draws: int) -> pd.DataFrame:
    """How often the nominal 95 % interval of each of `STATISTICS` holds its average over the draws.

    One row per statistic: seeds, draws, the `average`, the share `covered`, the average half-`width` of the interval, and the
    `needed` one, 1.96 standard deviations over the draws.
    """
    rng, found = np.random.default_rng(seeds), dict[str, list[Interval]]()
    for _ in trange(draws, desc=f"{seeds} seeds", unit="draw", disable=None):
        stability, features, parts = simulated(rng, seeds)
        bands = Banding(stability, list(range(seeds)))
        for name, interval in STATISTICS.items():
            found.setdefault(name, []).append(interval(features, bands, parts))
    rows = []
    for name, intervals in found.items():
        values = np.array([interval.value for interval in intervals])
        low, high = (np.array([getattr(interval, end) for interval in intervals]) for end in ("low", "high"))
        row = {"statistic": name, "seeds": seeds, "draws": draws, "average": values.mean()}
        row |= {"covered": float(((low <= values.mean()) & (values.mean() <= high)).mean())}
        rows.append(row | {"width": float((high - low).mean() / 2), "needed": 1.96 * values.std()})
    return pd.DataFrame(rows)
