"""The ledger of claims C1..C10 and questions B1..B5: what rules are made of, verdicts, and a line of the ledger.

A rule stands in the experiment that computes its numbers, and there before the numbers do. A condition is met when its whole 95 %
interval lies on the right side of its bound, failed when it lies on the wrong side, and open otherwise; a line needs all its
conditions. A claim has up to three lines, which are never folded into one.
"""

import math
from collections.abc import Sequence
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

OTHERWISE = "weaker than the bound if one misses it, opposite if one lies beyond no effect, and inconclusive otherwise"
"""How rules end, after what is asked of a supported line."""

MOST = 0.5
"""More than half: what a share must exceed for `most`."""


NOWHERE = Interval(math.nan, math.nan, math.nan)
"""Of what has no value, such as a null that a line does not have."""


@dataclass(frozen=True)
class Condition:
    """One part of a rule: an interval against a bound."""

    what: str
    interval: Interval
    bound: float
    below: bool = False
    """Whether the interval must lie below the bound, and not above it."""
    no_effect: float | None = None
    """The value that says that there is no effect; by default the bound."""

    @property
    def met(self) -> bool | None:
        """True or False where the interval lies on one side of the bound, None where it does not."""
        return self._beyond(self.bound)

    @property
    def opposite(self) -> bool:
        """Whether the interval lies on the other side of no effect."""
        return self._beyond(self.bound if self.no_effect is None else self.no_effect) is False

    def _beyond(self, bound: float) -> bool | None:
        low, high = (-self.interval.high, -self.interval.low) if self.below else (self.interval.low, self.interval.high)
        bound = -bound if self.below else bound
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


VERDICTS = ("supported", "weaker than the bound", "opposite", "inconclusive", "depends on the definition", "not tested")


def verdict(conditions: list[Condition]) -> str:
    """`opposite` where an interval lies on the other side of no effect, `weaker than the bound` where one misses a bound only."""
    if any(condition.opposite for condition in conditions):
        return "opposite"
    outcomes = [condition.met for condition in conditions]
    if False in outcomes:
        return "weaker than the bound"
    return "inconclusive" if None in outcomes else "supported"


def judged(
    rule: Rule,
    value: Interval,
    null: Interval,
    conditions: list[Condition],
    other_definition: list[Condition] | None = None,
    needed: Sequence[Condition] = (),
) -> dict:
    """A line of the ledger, of a cell that is named when lines are put together. The null's value stands beside the statistic's.

    Where the same conditions by another definition (`other_definition`) give another verdict, it `depends on the definition`.
    Where conditions that the test itself needs are not met (`needed`), the claim is `not tested`, and the line says by what.
    """
    found = verdict(conditions)
    if other_definition is not None and verdict(other_definition) != found:
        found = "depends on the definition"
    if not all(condition.met for condition in needed):
        found = "not tested"
    return {
        "id": rule.claim,
        "claim": CLAIMS[rule.claim],
        "line": rule.line,
        "verdict": found,
        "scope": "in this model, on this corpus",
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
            for condition in (*needed, *conditions)
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
