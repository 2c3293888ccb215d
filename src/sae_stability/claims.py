"""The ledger of claims C1..C10 and questions B1..B5: statistic, null, decision rule and verdict.

Rules stand here before the numbers do. A condition is met when its whole 95 % interval lies on the right side of its
bound, failed when it lies on the wrong side, and open otherwise; a claim needs all its conditions.
"""

import math
from dataclasses import dataclass

from sae_stability.matching import Stability
from sae_stability.statistics import Interval, difference

CLAIMS = {
    "C1": "Feature stability, the probability that a similar feature reappears in an independently trained SAE, "
    "is a per-feature signal that separates stable from unstable features",
    "C2": "Stable features carry most of the reconstruction-relevant signal",
    "C3": "Stable features carry most of the prediction-relevant signal",
    "C4": "Unstable features have a weak marginal impact",
    "C5": "Unstable features are dominated by low-frequency surface-form triggers, in activation statistics",
    "C6": "Unstable features are dominated by low-frequency surface-form triggers, in automatic explanations",
    "C7": "Unstable features are individually non-reproducible but concentrate in reproducible subspaces of lower rank",
    "C8": "Low-rank ground-truth features are recovered as a subspace while they stay non-identifiable as single latents",
    "C9": "Pooling the unique features of several seeds gives a more stable SAE and preserves explained variance",
    "C10": "The findings hold across seeds, models, layers, dictionary sizes and SAE variants",
    "B1": "What such a study costs, and how the cost grows",
    "B2": "How the findings move with model size, width, training tokens and number of seeds",
    "B3": "Whether they hold for methods other than SAEs",
    "B4": "Which part of the seed matters: the initialisation or the order of the data",
    "B5": "Whether stability can be predicted from one SAE alone",
}

SMALLEST_SEPARATION = 0.5
SMALLEST_BAND = 0.05

C1_STATISTIC = "reappearance rate of stable less that of unstable features, in a seed that had no say in the bands"
C1_RULE = (
    f"supported in this model if the 95 % intervals over seeds lie above their bounds: the statistic above {SMALLEST_SEPARATION}, "
    "the mean stability above the surrogate ensemble's, "
    f"and the share of features in the stable and in the unstable band above {SMALLEST_BAND:.0%} each; "
    "not supported if one lies below; inconclusive otherwise"
)


@dataclass(frozen=True)
class Condition:
    """One part of a rule: an interval against a bound."""

    what: str
    interval: Interval
    bound: float

    @property
    def met(self) -> bool | None:
        """True or False where the interval lies on one side of the bound, None where it does not."""
        if self.interval.low > self.bound:
            return True
        return False if self.interval.high <= self.bound else None


def verdict(conditions: list[Condition]) -> str:
    outcomes = [condition.met for condition in conditions]
    if False in outcomes:
        return "not supported"
    return "inconclusive" if None in outcomes else "supported"


def judge_c1(real: Stability, surrogate: Stability, cell: str) -> dict:
    """C1 on one cell. The mean over pairs does not depend on the number of seeds, so the two means compare at unequal S."""
    separation, shares = real.separation(), real.shares()
    conditions = [
        Condition("separation", separation, SMALLEST_SEPARATION),
        Condition("mean stability less the surrogate's", difference(real.mean(), surrogate.mean()), 0.0),
        Condition("share of stable features", shares["stable"], SMALLEST_BAND),
        Condition("share of unstable features", shares["unstable"], SMALLEST_BAND),
    ]
    return {
        "id": "C1",
        "claim": CLAIMS["C1"],
        "verdict": verdict(conditions),
        "scope": "in this model, on this corpus",
        "statistic": C1_STATISTIC,
        "value": _number(separation.value),
        "ci_low": _number(separation.low),
        "ci_high": _number(separation.high),
        "null": _number(surrogate.separation().value),
        "value_at_null_seeds": _number(real.among(list(range(min(len(real.alive), len(surrogate.alive))))).separation().value),
        "rule": C1_RULE,
        "cell": cell,
        "seeds": len(real.alive),
        "null_seeds": len(surrogate.alive),
        "conditions": [
            {
                "what": condition.what,
                "value": _number(condition.interval.value),
                "ci_low": _number(condition.interval.low),
                "ci_high": _number(condition.interval.high),
                "bound": condition.bound,
                "met": condition.met,
            }
            for condition in conditions
        ],
    }


def not_tested(claim: str, cell: str) -> dict:
    """A line of the ledger for a claim that no chapter tests yet."""
    blank = dict.fromkeys(("statistic", "value", "ci_low", "ci_high", "null", "rule"))
    return {"id": claim, "claim": CLAIMS[claim], "verdict": "not tested", **blank, "cell": cell}


def _number(value: float) -> float | None:
    """JSON has no NaN: an interval that does not exist is null."""
    return round(value, 6) if math.isfinite(value) else None
