"""Cells that share a model, a layer or a variant are no draws of their own: their mean with crossed random effects.

The value of cell i is mu + sum over the axes a of b_a[level of i] + u_i + e_i: what it shares with every cell of the same level of
an axis, what is its own, and its error, whose size is known. Variances are those of restricted maximum likelihood (Patterson &
Thompson 1971, doi:10.1093/biomet/58.3.545; for crossed factors Bates et al. 2015, doi:10.18637/jss.v067.i01).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import linalg, optimize, stats

from sae_stability.statistics import Interval

OWN = "cell"
"""What a cell shares with no other."""


class Crossed(NamedTuple):
    """What cells find together."""

    mean: Interval
    """By Student's t with a degree of freedom less than the axis of the fewest levels has levels, which is on the safe side."""
    spread: dict[str, float]
    """The standard deviation of each axis's effects, and of what is a cell's own."""


def crossed(value: Float[np.ndarray, "cell"], error: Float[np.ndarray, "cell"], levels: pd.DataFrame) -> Crossed:
    """Put cells together by their values, standard errors and levels (one row a cell, one column an axis).

    Left out is an axis that all cells share, and one in which no two cells are alike: neither can be told from the rest. Fewer than
    three cells have no interval.
    """
    shared = {str(axis): codes for axis in levels if 1 < len(set(codes := pd.factorize(levels[axis])[0])) < len(codes)}
    if len(value) < 3:
        mean = float(np.mean(value)) if len(value) else np.nan
        return Crossed(Interval(mean, np.nan, np.nan), dict.fromkeys([*shared, OWN], np.nan))
    alike = [codes[:, None] == codes for codes in shared.values()] + [np.eye(len(value))]
    scale = float(np.std(value)) or 1.0

    def fitted(spread: Float[np.ndarray, "axis"]) -> tuple[float, float, float]:
        """Minus twice the restricted log likelihood, the mean and its variance."""
        covariance = np.diag((error / scale) ** 2) + sum(own**2 * same for own, same in zip(spread, alike, strict=True))
        factor = linalg.cho_factor(covariance, lower=True)
        weights = linalg.cho_solve(factor, np.ones(len(value)))
        mean = weights @ (value / scale) / weights.sum()
        residual = value / scale - mean
        deviance = 2 * np.log(np.diag(factor[0])).sum() + np.log(weights.sum()) + residual @ linalg.cho_solve(factor, residual)
        return float(deviance), float(mean), float(1 / weights.sum())

    starts = [np.full(len(alike), start) for start in (0.1, 0.5)]
    within = [(0.0, 10.0)] * len(alike)
    found = [optimize.minimize(lambda spread: fitted(spread)[0], start, bounds=within, method="L-BFGS-B") for start in starts]
    best = min(found, key=lambda each: each.fun).x
    _, mean, variance = fitted(best)
    freedom = min((len(set(codes)) for codes in shared.values()), default=len(value)) - 1
    reach = scale * float(stats.t.ppf(0.975, freedom)) * variance**0.5
    spread = dict(zip([*shared, OWN], (scale * best).tolist(), strict=True))
    return Crossed(Interval(scale * mean, scale * mean - reach, scale * mean + reach), spread)
