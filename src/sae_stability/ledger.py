"""The ledger of claims C1..C10 and questions B1..B5: what rules are made of, verdicts, and a line of the ledger.

A rule stands in the experiment that computes its numbers, and there before the numbers do. A condition is met when its whole 95 %
interval lies on the right side of its bound, failed when it lies on the wrong side, and open otherwise; a claim needs all its
conditions.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sae_stability.statistics import Interval

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

Line = Literal["as stated", "beyond size and noise", "beyond energy and frequency"]
"""How a claim is read: as the paper asks, against the nulls, and against features that are alike in energy and frequency."""

MOST = 0.5
"""More than half: what a share must exceed for `most`."""


@dataclass(frozen=True)
class Condition:
    """One part of a rule: an interval against a bound."""

    what: str
    interval: Interval
    bound: float
    below: bool = False
    """Whether the interval must lie below the bound, and not above it."""
    control: bool = False
    """Whether it sets the band beside features that are like it in another respect."""

    @property
    def met(self) -> bool | None:
        """True or False where the interval lies on one side of the bound, None where it does not."""
        low, high = (-self.interval.high, -self.interval.low) if self.below else (self.interval.low, self.interval.high)
        bound = -self.bound if self.below else self.bound
        if low > bound:
            return True
        return False if high <= bound else None


@dataclass(frozen=True)
class Rule:
    """What is asked of a claim, in words."""

    claim: str
    statistic: str
    verdict: str
    line: Line = "as stated"


def verdict(conditions: list[Condition]) -> str:
    outcomes = [condition.met for condition in conditions]
    if False in outcomes:
        return "not supported"
    return "inconclusive" if None in outcomes else "supported"


def judged(rule: Rule, value: Interval, null: Interval, conditions: list[Condition]) -> dict:
    """A line of the ledger, of a cell that is named when lines are put together. The null's value stands beside the statistic's."""
    scope = "in this model, on this corpus"
    plain = [condition for condition in conditions if not condition.control]
    if len(plain) < len(conditions) and verdict(plain) == "supported" and verdict(conditions) != "supported":
        scope += "; it holds raw, and not beside the features that it is matched with"
    return {
        "id": rule.claim,
        "claim": CLAIMS[rule.claim],
        "line": rule.line,
        "verdict": verdict(conditions),
        "scope": scope,
        "statistic": rule.statistic,
        **_interval(value),
        "null": number(null.value),
        "rule": rule.verdict,
        "conditions": [
            {
                "what": condition.what,
                **_interval(condition.interval),
                "bound": condition.bound,
                "below": condition.below,
                "met": condition.met,
            }
            for condition in conditions
        ],
    }


def not_tested(claim: str) -> dict:
    """A line of the ledger for a claim that nothing in the study tests."""
    blank = dict.fromkeys(("statistic", "value", "ci_low", "ci_high", "null", "rule"))
    return {"id": claim, "claim": CLAIMS[claim], "line": "as stated", "verdict": "not tested", **blank}


def named_interval(name: str, interval: Interval) -> dict:
    """An interval as three JSON values, for what stands beside a line."""
    return {name: number(interval.value), f"{name}_low": number(interval.low), f"{name}_high": number(interval.high)}


def number(value: float) -> float | None:
    """JSON has no NaN: an interval that does not exist is null."""
    return round(value, 6) if math.isfinite(value) else None


def _interval(interval: Interval) -> dict:
    return {"value": number(interval.value), "ci_low": number(interval.low), "ci_high": number(interval.high)}
