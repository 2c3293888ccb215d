"""Every rule by which features of two SAEs are called shared, on the same SAEs: what is one question has had answers from a few per
cent to nine in ten.
"""

from itertools import product

import numpy as np
import pandas as pd

from sae_stability.experiments import matching
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.matching import Stability, mean_mcc
from sae_stability.statistics import Interval, jackknife

RULES = ("decoder", "mutual", "one-to-one", "encoder", "decoder and encoder")
"""Of the criteria of `matching`, those by which a share of shared features was published."""
THRESHOLDS = (0.5, 0.7, 0.9)
ASKED = {"some": "in some other seed", "another": "in another seed", "every": "in every other seed"}
"""Where a feature has to come back to be shared. Of several seeds it may be asked either way, with the opposite effect."""
KINDS = ("real", "surrogate")


def shared(results: Results) -> pd.DataFrame:
    """One row per kind, criterion, threshold and place asked: the share of live features that are shared by that rule.

    All with as many seeds as the smaller of the two ensembles has, since *some* and *every* depend on their number. And one row per
    kind whose criterion is `mcc`: the mean cosine of one-to-one partners, which has no threshold.
    """
    seeds = list(range(min(len(matching.stability(results, kind).alive) for kind in KINDS)))
    rows = []
    for kind in KINDS:
        for criterion, threshold in product(RULES, THRESHOLDS):
            matched = matching.stability(results, kind, criterion).among(seeds).at(threshold)
            for asked in ASKED:
                row = {"kind": kind, "criterion": criterion, "threshold": threshold, "asked": asked, "seeds": len(seeds)}
                rows.append(row | interval_columns("share", share(matched, asked)))
        row = {"kind": kind, "criterion": "mcc", "threshold": np.nan, "asked": "another", "seeds": len(seeds)}
        rows.append(row | interval_columns("share", mean_mcc(matching.stability(results, kind, "one-to-one").among(seeds))))
    return pd.DataFrame(rows)


def share(matched: Stability, asked: str) -> Interval:
    """The share of live features that come back in `some`, `another` or `every` other seed, jackknifed over seeds."""
    if asked == "another":
        return matched.mean()

    def estimate(seeds: list[int]) -> float:
        counts, alive = matched.matched[seeds][:, seeds].sum(1), matched.alive[seeds]
        enough = 1 if asked == "some" else len(seeds) - 1
        return float((counts[alive] >= enough).double().mean())

    return jackknife(estimate, len(matched.alive)).within(0, 1)


EXPERIMENT = Experiment("sharing", None, report_after=("matching",), report_reads=("threshold",), tables={"sharing": shared})
