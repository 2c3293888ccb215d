"""The ledger of claims C1..C10 and questions B1..B5: statistic, null, decision rule and verdict.

Rules stand here before the numbers do. A condition is met when its whole 95 % interval lies on the right side of its
bound, failed when it lies on the wrong side, and open otherwise; a claim needs all its conditions.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from sae_stability.ablation import Effects, Sets
from sae_stability.explanations import Rules
from sae_stability.matching import BANDS, Stability
from sae_stability.statistics import Interval, difference, mean_interval
from sae_stability.triggers import compare, shuffled_share, surface_share

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


MOST = 0.5
WEAK = 0.5
SMALLEST_SUPPORT = 0.3
STABLE_BAND = ("band", "stable")

C2_STATISTIC = "share of what all features add to the explained variance that is lost without the stable ones, codes fixed"
C2_RULE = (
    "supported in this model if the 95 % intervals lie above their bounds: what is lost without the stable features, and what is "
    f"kept with them only, above {MOST:g} of what all features carry; the first above that of as many random features, with codes "
    "fixed, and once codes are chosen again and the decoder fitted again; not supported if one lies below; inconclusive otherwise"
)
C3_STATISTIC = (
    "share of what the removal of all features adds to the cross-entropy that is added without the stable ones, error kept"
)
C3_RULE = (
    "supported in this model if the 95 % intervals lie above their bounds: what is lost without the stable features, and what is "
    f"kept with them only, above {MOST:g} of what all features carry; the first above that of as many random features; and that of "
    "stable features above that of their matches outside the band, alike in energy and frequency; not supported if one lies below; "
    f"inconclusive otherwise, and where less than {SMALLEST_SUPPORT:.0%} of the band's energy has a match"
)
C4_STATISTIC = "mean impact of an unstable feature alone on the cross-entropy, to second order, where an average live feature has 1"
C4_RULE = (
    f"supported in this model if the statistic is equivalent to 0 within {WEAK:g} (two one-sided tests at 5 %), and the impact of "
    "unstable features lies below that of their matches outside the band, alike in energy and frequency (95 %); not supported if "
    f"one fails; inconclusive otherwise, and where less than {SMALLEST_SUPPORT:.0%} of the band's energy has a match"
)

C5_STATISTIC = "share of the unstable features whose trigger is of surface form, by a written rule"
C5_RULE = (
    "supported in this model if the 95 % intervals over seeds lie on their side of the bounds: the statistic above "
    f"{MOST:g}; Cliff's delta of unstable against stable features below 0 for firing frequency, and above 0 for the share of the "
    "variance that the token tells, among all of them and among those that fire equally often; not supported if one fails; "
    "inconclusive otherwise"
)

C6_STATISTIC = "share of the unstable features whose explanation by a language model is of surface form, by a written rule"
C6_RULE = (
    f"supported in this model if the 95 % intervals over seeds lie above their bounds: the statistic above {MOST:g}, and above the "
    "same share of stable features; not supported if one lies below; inconclusive otherwise; not tested unless a language model "
    "that does not see the band wrote the explanations"
)


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


def verdict(conditions: list[Condition]) -> str:
    outcomes = [condition.met for condition in conditions]
    if False in outcomes:
        return "not supported"
    return "inconclusive" if None in outcomes else "supported"


def judge_c1(real: Stability, nulls: dict[str, Stability], cell: str) -> dict:
    """C1 on one cell. The mean over pairs does not depend on the number of seeds, so the means compare at unequal S.

    The surrogate has no features to find, so the rule asks for more than it has. A model with shuffled weights (`randomised`)
    has features, of its tokens: what reappears there is not noise, so it stands beside the verdict and not in the rule.
    """
    separation, shares, surrogate = real.separation(), real.shares(), nulls["surrogate"]
    conditions = [
        Condition("separation", separation, SMALLEST_SEPARATION),
        Condition("mean stability less the surrogate's", difference(real.mean(), surrogate.mean()), 0.0),
        Condition("share of stable features", shares["stable"], SMALLEST_BAND),
        Condition("share of unstable features", shares["unstable"], SMALLEST_BAND),
    ]
    beside = {
        "value_at_null_seeds": _number(real.among(list(range(min(len(real.alive), len(surrogate.alive))))).separation().value),
        "seeds": len(real.alive),
        "null_seeds": len(surrogate.alive),
        "nulls": [
            {
                "null": kind,
                "seeds": len(null.alive),
                **_told("mean_stability", null.mean()),
                **_told("above", difference(real.mean(), null.mean())),
            }
            for kind, null in nulls.items()
        ],
    }
    return _judged("C1", C1_STATISTIC, separation, surrogate.separation(), C1_RULE, cell, conditions) | beside


def judge_c2(effects: Effects, surrogate: Effects, cell: str) -> dict:
    """C2 on one cell: most of the reconstruction. The null's value is the surrogate's, by its own stable band."""
    again = effects.share("reselected", "removed", STABLE_BAND, less=("random", "stable"))
    what = "the same once codes are chosen again and the decoder is fitted again"
    conditions = [*_carries_most(effects, "reconstruction"), Condition(what, again, 0.0, control=True)]
    value, null = (of.share("reconstruction", "removed", STABLE_BAND) for of in (effects, surrogate))
    return _judged("C2", C2_STATISTIC, value, null, C2_RULE, cell, conditions)


def judge_c3(effects: Effects, sets: Sets, surrogate: Effects, cell: str) -> dict:
    """C3 on one cell: most of the prediction. The null's value is that of the surrogate's SAEs on the model's activations."""
    apart = effects.share("prediction", "removed", ("paired", "stable"), less=("matched", "stable"))
    what = "lost without stable features that have a match, less that of their matches"
    matched = _supported(Condition(what, apart, 0.0, control=True), sets, "stable")
    value, null = (of.share("prediction", "removed", STABLE_BAND) for of in (effects, surrogate))
    return _judged("C3", C3_STATISTIC, value, null, C3_RULE, cell, [*_carries_most(effects, "prediction"), matched])


def _carries_most(effects: Effects, measure: str) -> list[Condition]:
    apart = effects.share(measure, "removed", STABLE_BAND, less=("random", "stable"))
    return [
        Condition("lost without the stable features", effects.share(measure, "removed", STABLE_BAND), MOST),
        Condition("kept with the stable features only", effects.share(measure, "kept", STABLE_BAND), MOST),
        Condition("lost without the stable features, less that of as many random ones", apart, 0.0),
    ]


def judge_c4(effects: Effects, sets: Sets, surrogate: Effects, surrogate_sets: Sets, cell: str) -> dict:
    """C4 on one cell: a weak marginal impact is one that is equivalent to none, within a margin."""
    unstable = ("band", "unstable")
    one_sided = effects.marginal(sets, unstable, confidence=0.9)  # its ends are those of the two one-sided tests
    apart = effects.marginal(sets, ("paired", "unstable"), ("matched", "unstable"))
    what = "impact of unstable features that have a match, less that of their matches"
    matched = _supported(Condition(what, apart, 0.0, below=True, control=True), sets, "unstable")
    conditions = [
        Condition("impact of an unstable feature (90 % interval)", one_sided, -WEAK),
        Condition("impact of an unstable feature (90 % interval)", one_sided, WEAK, below=True),
        matched,
    ]
    value, null = effects.marginal(sets, unstable), surrogate.marginal(surrogate_sets, unstable)
    return _judged("C4", C4_STATISTIC, value, null, C4_RULE, cell, conditions)


def judge_c5(features: pd.DataFrame, cell: str) -> dict:
    """C5 on one cell, from the triggers of its features. The null's value is that of a text whose tokens are shuffled."""
    compared = compare(features).set_index(["features", "quantity"])

    def delta(chosen: str, quantity: str) -> Interval:
        row = compared.loc[(chosen, quantity)]
        return Interval(row["delta"], row["delta_low"], row["delta_high"])

    value = surface_share(features, "unstable")
    token, equal = (delta(chosen, "explained_token") for chosen in ("all", "equal frequency"))
    conditions = [
        Condition("unstable features with a trigger of surface form", value, MOST),
        Condition("Cliff's delta of firing frequency", delta("all", "frequency"), 0.0, below=True),
        Condition("Cliff's delta of what the token tells", token, 0.0),
        Condition("Cliff's delta of what the token tells, at equal frequency", equal, 0.0, control=True),
    ]
    null = Interval(shuffled_share(features, "unstable"), math.nan, math.nan)
    return _judged("C5", C5_STATISTIC, value, null, C5_RULE, cell, conditions)


def judge_c6(explained: pd.DataFrame, cell: str) -> list[dict]:
    """C6 on one cell, by what language models wrote; no line where none did. The null's value is that of stable features."""
    by_model = explained[explained["engine"] != Rules.name]
    if by_model.empty:
        return []
    shares = by_model.groupby(["seed", "band"])["surface"].mean().unstack().reindex(columns=list(BANDS))
    unstable, stable = (mean_interval(shares[band].dropna()) for band in ("unstable", "stable"))
    apart = mean_interval((shares["unstable"] - shares["stable"]).dropna())
    conditions = [
        Condition("explanations of unstable features of surface form", unstable, MOST),
        Condition("the same, less that of stable features", apart, 0.0),
    ]
    return [_judged("C6", C6_STATISTIC, unstable, stable, C6_RULE, cell, conditions)]


def _supported(condition: Condition, sets: Sets, band: str) -> Condition:
    """A matched comparison that covers too little of the band's energy tells nothing, whatever it finds."""
    support = sets.mean_support(band)
    told = replace(condition, what=f"{condition.what} ({support:.0%} of the band's energy has one)")
    if support < SMALLEST_SUPPORT:
        return replace(told, interval=Interval(condition.interval.value, math.nan, math.nan))
    return told


def _judged(claim: str, statistic: str, value: Interval, null: Interval, rule: str, cell: str, conditions: list[Condition]) -> dict:
    """A line of the ledger."""
    scope = "in this model, on this corpus"
    plain = [condition for condition in conditions if not condition.control]
    if len(plain) < len(conditions) and verdict(plain) == "supported" and verdict(conditions) != "supported":
        scope += "; it holds raw, and not beside the features that it is matched with"
    return {
        "id": claim,
        "claim": CLAIMS[claim],
        "verdict": verdict(conditions),
        "scope": scope,
        "statistic": statistic,
        "value": _number(value.value),
        "ci_low": _number(value.low),
        "ci_high": _number(value.high),
        "null": _number(null.value),
        "rule": rule,
        "cell": cell,
        "conditions": [
            {
                "what": condition.what,
                "value": _number(condition.interval.value),
                "ci_low": _number(condition.interval.low),
                "ci_high": _number(condition.interval.high),
                "bound": condition.bound,
                "below": condition.below,
                "met": condition.met,
            }
            for condition in conditions
        ],
    }


def not_tested(claim: str, cell: str) -> dict:
    """A line of the ledger for a claim that no chapter tests yet."""
    blank = dict.fromkeys(("statistic", "value", "ci_low", "ci_high", "null", "rule"))
    return {"id": claim, "claim": CLAIMS[claim], "verdict": "not tested", **blank, "cell": cell}


def _told(name: str, interval: Interval) -> dict:
    return {name: _number(interval.value), f"{name}_low": _number(interval.low), f"{name}_high": _number(interval.high)}


def _number(value: float) -> float | None:
    """JSON has no NaN: an interval that does not exist is null."""
    return round(value, 6) if math.isfinite(value) else None
