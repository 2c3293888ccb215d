"""Single features, each removed alone, and how much of what they do reappears in another seed: in the model and its surrogate."""

from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import get_args

import pandas as pd
from safetensors.torch import load_file

from sae_stability import ablation
from sae_stability.ablation import Impacts, Reappearing, Weight
from sae_stability.experiments import matching, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import save_tensors
from sae_stability.matching import at_equal_frequency
from sae_stability.statistics import Interval

KINDS = ["real", "surrogate"]


def compute(results: Results, folder: Path) -> None:
    """Remove every feature alone. The surrogate's SAEs read what they were trained on; for prediction, the model's activations."""
    site = texts.reading(results, results.study.loss_tokens)
    cluster = site.contexts.cluster[site.contexts.is_text]
    for kind in KINDS:
        measured = ablation.measure_impacts(encoded(results, kind), matching.stability(results, kind), cluster, site)
        save_tensors(folder / f"{kind}.safetensors", measured.tensors(), {})


def single(results: Results, kind: str = "real") -> Reappearing:
    """What single features weigh, and how much of it reappears."""
    return Reappearing(_load(results.folder("impacts") / f"{kind}.safetensors"), matching.stability(results, kind))


@lru_cache(maxsize=2)
def _load(path: Path) -> Impacts:
    return Impacts(**load_file(path))


def reappearing(results: Results) -> pd.DataFrame:
    """One row per kind and weight: how much of the features, their energy and their impacts reappears, over all pairs of seeds.

    Of the surrogate also at the frequencies of the model's features (`at equal frequency`).
    """
    of_kind = {kind: single(results, kind) for kind in KINDS}
    rows = []
    for kind, weight in product(KINDS, get_args(Weight)):
        rows.append({"kind": kind, "weight": weight, **interval_columns("share", of_kind[kind].share(weight))})
    for weight in get_args(Weight):
        equal = null_at_equal_frequency(of_kind["real"], of_kind["surrogate"], weight)
        rows.append({"kind": "surrogate at equal frequency", "weight": weight, **interval_columns("share", equal)})
    return pd.DataFrame(rows)


def null_at_equal_frequency(real: Reappearing, null: Reappearing, weight: Weight) -> Interval:
    """How much of a weight of a null's features would reappear, if they fired as often as the real ones."""
    return at_equal_frequency(null.stability, null.weight(weight), null.frequency, real.weight(weight), real.frequency)


EXPERIMENT = Experiment(
    "impacts",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens", "loss_tokens"),
    tables={"reappearing": reappearing},
)
