"""How well a classifier agrees with labels: the share of texts on which it does, and Cohen's kappa."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sae_stability.statistics import SAMPLES, Interval, binomial_interval


@dataclass(frozen=True)
class Agreement:
    """Agreement of yes-or-no answers with labels."""

    share: Interval
    """Texts on which the two agree, with its exact binomial interval."""
    kappa: Interval
    """Agreement beyond chance, texts resampled. NaN where both say the same of every text: chance agrees as well."""


def agreement(labels: Bool[np.ndarray, "text"], answers: Bool[np.ndarray, "text"]) -> Agreement:
    """Share and kappa of some texts, with intervals at 95 %: conditional on the rater."""
    cells = np.bincount(2 * labels + answers, minlength=4)
    agreed = cells[[0, 3]].sum(keepdims=True)
    (low,), (high,) = binomial_interval(agreed, len(labels))
    drawn = cohens_kappa(np.random.default_rng(0).multinomial(len(labels), cells / len(labels), SAMPLES))
    kappa = float(cohens_kappa(cells))
    ends = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(kappa) else (np.nan, np.nan)
    share = Interval(float(agreed[0] / len(labels)), float(low), float(high))
    return Agreement(share, Interval(kappa, float(ends[0]), float(ends[1])))


def cohens_kappa(cells: Int[np.ndarray, "*sample 4"]) -> np.ndarray:
    """(observed - chance) / (1 - chance), from counts of no/no, no/yes, yes/no and yes/yes.

    Cohen 1960, doi:10.1177/001316446002000104.
    """
    shares = cells / cells.sum(-1, keepdims=True)
    neither, only_answer, only_label, both = np.moveaxis(shares, -1, 0)
    chance = (only_label + both) * (only_answer + both) + (neither + only_answer) * (neither + only_label)
    with np.errstate(invalid="ignore"):
        return np.where(chance < 1, (neither + both - chance) / (1 - chance), np.nan)
