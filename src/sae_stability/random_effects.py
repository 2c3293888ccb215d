"""Cells that share a model, a layer or a variant are no draws of their own: their mean with crossed random effects.

The value of cell i is mu + sum over the axes a of b_a[level of i] + u_i + e_i: what it shares with every cell of the same level of
an axis, what is its own, and its error, whose size is known. Variances are those of restricted maximum likelihood (Patterson &
Thompson 1971, doi:10.1093/biomet/58.3.545) with a penalty that keeps those of few levels from being taken for zero, or for
anything: the log density of each standard deviation, Gamma(2, 1) in units of that of all values (Chung et al. 2013,
doi:10.1007/s11336-013-9328-2).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import linalg, optimize, stats

from sae_stability.statistics import Interval

OWN = "cell"
"""What a cell shares with no other."""
SMALLEST = 1e-4
"""Standard deviation of an axis, where all values have about one."""


class Crossed(NamedTuple):
    """What cells find together."""

    mean: Interval
    """By Student's t with a degree of freedom less than the axis of the fewest levels has levels. It speaks of axes whose levels
    differ: where all cells are of one model, of that model."""
    spread: dict[str, float]
    """The standard deviation of each axis's effects, and of what is a cell's own."""


def crossed(value: Float[np.ndarray, "cell"], error: Float[np.ndarray, "cell"], levels: pd.DataFrame) -> Crossed:
    """Put cells together by their values, standard errors and levels (one row a cell, one column an axis).

    Left out is an axis that all cells share, and one in which no two cells are alike: neither can be told from the rest. Where no
    axis is left, or fewer than three cells are given, there is no interval.
    """
    shared = {str(axis): codes for axis in levels if 1 < len(set(codes := pd.factorize(levels[axis])[0])) < len(codes)}
    if len(value) < 3 or not shared:
        mean = float(np.mean(value)) if len(value) else np.nan
        return Crossed(Interval(mean, np.nan, np.nan), dict.fromkeys([*shared, OWN], np.nan))
    alike = [codes[:, None] == codes for codes in shared.values()] + [np.eye(len(value))]
    scale = max(float(np.std(value)), float(np.median(error)))

    def fitted(logarithms: Float[np.ndarray, "axis"]) -> tuple[float, float, float]:
        """Minus twice the penalised log likelihood, the mean and its variance, by the logarithms of the spreads."""
        spread = np.exp(logarithms)
        covariance = np.diag((error / scale) ** 2) + sum(own**2 * same for own, same in zip(spread, alike, strict=True))
        factor = linalg.cho_factor(covariance, lower=True)
        weights = linalg.cho_solve(factor, np.ones(len(value)))
        mean = weights @ (value / scale) / weights.sum()
        residual = value / scale - mean
        deviance = 2 * np.log(np.diag(factor[0])).sum() + np.log(weights.sum()) + residual @ linalg.cho_solve(factor, residual)
        return float(deviance - 2 * (logarithms - spread).sum()), float(mean), float(1 / weights.sum())

    within = [(np.log(SMALLEST), np.log(10))] * len(alike)
    starts = [np.full(len(alike), np.log(start)) for start in (0.1, 0.5)]
    found = [optimize.minimize(lambda spread: fitted(spread)[0], start, bounds=within, method="L-BFGS-B") for start in starts]
    best = min(found, key=lambda each: each.fun).x
    _, mean, variance = fitted(best)
    freedom = min(len(set(codes)) for codes in shared.values()) - 1
    reach = scale * float(stats.t.ppf(0.975, freedom)) * variance**0.5
    spread = dict(zip([*shared, OWN], (scale * np.exp(best)).tolist(), strict=True))
    return Crossed(Interval(scale * mean, scale * mean - reach, scale * mean + reach), spread)
