"""Do the findings hold elsewhere (C10)? What a claim finds on every cell of a grid, put together.

Cells differ in what was trained, so that their values scatter by more than their intervals say. They are put together with random
effects: a mean over cells, how much cells scatter beyond their own error, and where the next cell of the kind would lie. A cell
that shares a model with another is not a draw of its own, so the mean is asked for without each of the models, too.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from scipy.optimize import brentq

from sae_stability.ledger import NOWHERE, OTHERWISE, Condition, Line, Rule, judged
from sae_stability.statistics import Interval, jackknifed_mean
from sae_stability.study import Study

ASKED = ("C1", "C2", "C3", "C4", "C5", "C7")
"""Claims that cells of any model can test. C6 needs a language model that explains, C8 is about worlds, and C9 needs many seeds."""
AXES = ("model", "hook_name", "variant", "d_sae")
"""What the cells of a grid must differ in, for C10 to be asked of it."""
LEVEL = 0.05

C10 = tuple(
    Rule(
        "C10",
        f"share of cells, over the claims {', '.join(ASKED)}, whose value lies beyond the claim's bound, with Holm's correction "
        "for the number of cells",
        "supported over this grid if the 95 % interval of every claim's mean over cells, with random effects, lies on the claimed "
        f"side of the claim's bound, and does without each of the models, too; {OTHERWISE}",
        line,
    )
    for line in get_args(Line)
)


class Together(NamedTuple):
    """What a line of a claim finds on several cells. Values are margins: how far a cell lies beyond the bound, as claimed."""

    cells: int
    right: int
    """Cells that lie on the claimed side of the bound, with Holm's correction for their number."""
    wrong: int
    """Those on the other side."""
    mean: Interval
    """Over cells, with random effects and Student's interval."""
    spread: float
    """Standard deviation of cells beyond their own error (Paule and Mandel, 1982)."""
    inconsistency: float
    """I^2: the share of the scatter of cells that their own error does not explain."""
    next_cell: Interval
    """Where another cell of the kind would lie: the prediction interval of Higgins, Thompson and Spiegelhalter (2009, eq. 12). It
    holds what it should where cells scatter by more than their own error, and is narrow where they do not."""


def effects(ledger: list[dict], study: Study) -> pd.DataFrame:
    """What each cell of a study finds of each line of the claims that are asked about: the first condition of its rule.

    Columns: cell, id, line, verdict, value, low, high, bound, margin (how far the value lies beyond the bound, on the claimed
    side), degrees (of freedom: a seed less than the cell has), and error: the standard error, by the width of the interval and
    Student's quantile. An interval holds more than one error, which a ledger does not tell apart: the error is too large where a
    null of fewer seeds makes it wide, and too small where the text does. What has no interval is left out.
    """
    seeds = {id: len(cell.seed_list) for id, cell in study.cells.items()}
    rows = []
    for each in ledger:
        if each["id"] not in ASKED or each["verdict"] == "not tested":
            continue
        first = each["conditions"][0]
        value, low, high = first["value"], first["ci_low"], first["ci_high"]
        if None in (value, low, high) or high <= low:
            continue
        margin = (value - first["bound"]) * (-1 if first["below"] else 1)
        row = {name: each[name] for name in ("cell", "id", "line", "verdict")} | {"value": value, "low": low, "high": high}
        degrees = seeds[each["cell"]] - 1
        error = (high - low) / 2 / stats.t.ppf(0.975, degrees)
        rows.append(row | {"bound": first["bound"], "margin": margin, "degrees": degrees, "error": error})
    numbers = ["value", "low", "high", "bound", "margin", "degrees", "error"]
    found = pd.DataFrame(rows, columns=["cell", "id", "line", "verdict", *numbers])
    return found.astype(dict.fromkeys(numbers, float))  # where there are none, too


def together(margin: Float[np.ndarray, "cell"], error: Float[np.ndarray, "cell"], degrees: Float[np.ndarray, "cell"]) -> Together:
    """Put cells together by their margins and standard errors, of some degrees of freedom; means of fewer than three cells have no
    interval."""
    cells, certain = len(margin), _certain(2 * stats.t.sf(np.abs(margin) / error, degrees))
    right, wrong = int((certain & (margin > 0)).sum()), int((certain & (margin < 0)).sum())
    if cells < 3:
        mean = Interval(float(np.mean(margin)), np.nan, np.nan) if cells else NOWHERE
        return Together(cells, right, wrong, mean, np.nan, np.nan, mean)

    def scatter(variance: float) -> float:
        """Cochran's Q, where cells have a variance of their own."""
        weight = 1 / (error**2 + variance)
        return float(weight @ (margin - weight @ margin / weight.sum()) ** 2)

    variance = 0.0
    if scatter(0.0) > cells - 1:
        variance = float(brentq(lambda variance: scatter(variance) - (cells - 1), 0.0, np.ptp(margin) ** 2 * cells))
    weight = 1 / (error**2 + variance)
    value = float(weight @ margin / weight.sum())
    of_mean = float(weight.sum()) ** -0.5

    def around(deviation: float, degrees: int) -> Interval:
        reach = float(stats.t.ppf(0.975, degrees)) * deviation
        return Interval(value, value - reach, value + reach)

    inconsistency = max(0.0, 1 - (cells - 1) / scatter(0.0)) if scatter(0.0) > 0 else 0.0
    next_cell = around((variance + of_mean**2) ** 0.5, cells - 2)
    return Together(cells, right, wrong, around(of_mean, cells - 1), variance**0.5, inconsistency, next_cell)


def over_draws(lines: Iterable[dict]) -> pd.DataFrame:
    """The lines of a claim on several draws of one cell, which have no seed in common: each condition over draws, a row each.

    Columns: line, what, bound, below, draws, met_in (draws in which the condition is met), and value, its mean over draws with
    Student's interval (value_low, value_high), and met: whether that mean meets the condition, None where it is open. All draws
    are measured on one text, which the interval has no part of. A condition that some draw has no value of is open.
    """
    found = pd.DataFrame([{"line": line["line"], **condition} for line in lines for condition in line.get("conditions", [])])
    rows = []
    for (line, what), of_draws in found.groupby(["line", "what"], sort=False) if len(found) else ():
        first, mean = of_draws.iloc[0], jackknifed_mean(of_draws["value"].astype(float))
        condition = Condition(what, mean, first["bound"], first["below"])
        counts = {"draws": len(of_draws), "met_in": sum(met is True for met in of_draws["met"])}
        row = {"line": line, "what": what, "bound": first["bound"], "below": first["below"], **counts}
        rows.append(row | {"value": mean.value, "value_low": mean.low, "value_high": mean.high, "met": condition.met})
    columns = ["line", "what", "bound", "below", "draws", "met_in", "value", "value_low", "value_high", "met"]
    return pd.DataFrame(rows, columns=columns)


def _certain(p: Float[np.ndarray, "cell"]) -> Bool[np.ndarray, "cell"]:
    """Which of some hypotheses can be rejected, by Holm's correction (1979)."""
    order = np.argsort(p, kind="stable")
    passed = p[order] <= LEVEL / np.arange(len(p), 0, -1)
    certain = np.zeros(len(p), bool)
    certain[order] = np.logical_and.accumulate(passed)
    return certain


def varies(study: Study) -> bool:
    """Whether the cells of a study differ in everything that C10 is about."""
    return all(len({getattr(cell, axis) for cell in study.cells.values()}) > 1 for axis in AXES)


def judge(ledger: list[dict], study: Study) -> list[dict]:
    """C10 over the cells of a grid; nothing of a study whose cells have something in common that C10 is about."""
    if not varies(study):
        return []
    return judge_c10(effects(ledger, study), {id: cell.model for id, cell in study.cells.items()})


def judge_c10(found: pd.DataFrame, models: Mapping[str, str]) -> list[dict]:
    """C10 from what each cell finds (`effects`); `models` says which model a cell is of."""
    of_model, lines = found["cell"].map(models), []
    for rule in C10:
        here = found[found["line"] == rule.line]
        conditions, right, cells = [], 0, 0
        for claim, of_claim in here.groupby("id"):
            whole = _of_rows(of_claim)
            right, cells = right + whole.right, cells + whole.cells
            conditions.append(Condition(f"{claim}, mean margin over cells", whole.mean, 0.0))
            for model in sorted(set(models.values())):
                rest = of_claim[of_model[of_claim.index] != model]
                without = _of_rows(rest)
                conditions.append(Condition(f"{claim}, the same without {model}", without.mean, 0.0))
        asked = Condition("claims that were asked", _exactly(here["id"].nunique()), len(ASKED) - 1)
        share = Interval(right / cells, np.nan, np.nan) if cells else NOWHERE
        lines.append(judged(rule, share, NOWHERE, conditions, needed=[asked]) | {"scope": "over the cells of this study"})
    return lines


def _of_rows(found: pd.DataFrame) -> Together:
    return together(*(found[name].to_numpy() for name in ("margin", "error", "degrees")))


def _exactly(number: int) -> Interval:
    return Interval(float(number), float(number), float(number))
