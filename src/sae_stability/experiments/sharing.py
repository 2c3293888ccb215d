"""Rules by which features of two SAEs are called shared, all on the same SAEs: what is one question has many answers."""

from itertools import product

import numpy as np
import pandas as pd

from sae_stability.experiments import matching
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.matching import Stability, mean_mcc
from sae_stability.statistics import Interval, jackknife

RULES = ("decoder", "mutual", "one-to-one", "encoder", "decoder and encoder")
"""Criteria of `matching` that compare directions."""
THRESHOLDS = (0.5, 0.7, 0.9)
WHERE = {"some": "in some other seed", "another": "in another seed", "every": "in every other seed"}
"""In which seeds a feature has to come back to be shared. *Some* and *every* depend on how many there are, in opposite ways."""
KINDS = ("real", "surrogate")


def shared(results: Results) -> pd.DataFrame:
    """One row per kind, criterion, threshold and where: the share of live features that are shared by that rule.

    *Some* and *every* with as many seeds as the smaller of the two ensembles has, since they depend on it; *another* with all. And
    one row per kind whose criterion is `mcc`: the mean cosine of one-to-one partners, which has no threshold.
    """
    fewest = min(len(matching.stability(results, kind).alive) for kind in KINDS)
    rows = []
    for kind in KINDS:
        for criterion, threshold in product(RULES, THRESHOLDS):
            matched = matching.stability(results, kind, criterion).at(threshold)
            for where in WHERE:
                among = matched if where == "another" else matched.among(list(range(fewest)))
                row = {"kind": kind, "criterion": criterion, "threshold": threshold, "where": where, "seeds": len(among.alive)}
                rows.append(row | interval_columns("share", share(among, where)))
        paired = matching.stability(results, kind, "one-to-one")
        row = {"kind": kind, "criterion": "mcc", "threshold": np.nan, "where": "another", "seeds": len(paired.alive)}
        rows.append(row | interval_columns("share", mean_mcc(paired)))
    return pd.DataFrame(rows)


def share(matched: Stability, where: str) -> Interval:
    """The share of a seed's live features that come back in `some`, `another` or `every` other seed, jackknifed over seeds."""
    if where == "another":
        return matched.mean()

    def estimate(seeds: list[int]) -> float:
        counts, alive = matched.matched[seeds][:, seeds].sum(1), matched.alive[seeds]
        enough = alive & (counts >= (1 if where == "some" else len(seeds) - 1))
        return float((enough.sum(1) / alive.sum(1)).mean())

    return jackknife(estimate, len(matched.alive)).within(0, 1)


EXPERIMENT = Experiment("sharing", None, report_after=("matching",), report_reads=("threshold",), tables={"sharing": shared})
