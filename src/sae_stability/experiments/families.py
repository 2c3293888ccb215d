"""Families: features over all seeds that are alike, and how many of them so many seeds meet."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from sae_stability.experiments import ensembles, quality
from sae_stability.experiments.columns import each_kind
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import save_arrays
from sae_stability.matching import Families
from sae_stability.matching import families as group


def compute(results: Results, folder: Path) -> None:
    """Group the live features of the ensemble, and those of its nulls."""
    for kind in results.cell.kinds:
        W_dec, alive = ensembles.ensemble(results, kind).W_dec, quality.alive(results, kind)
        save_arrays(folder / f"{kind}.safetensors", vars(group(W_dec, results.cell.threshold, alive)))


def families(results: Results, kind: str = "real") -> Families:
    arrays = load_file(results.folder("families") / f"{kind}.safetensors")
    return Families(*(arrays[field.name] for field in fields(Families)))


def sizes(results: Results) -> pd.DataFrame:
    """One row per family: its size, its medoid, and the mean cosine of the other members with it."""

    def rows(kind: str) -> pd.DataFrame:
        grouped, seeds = families(results, kind), np.array(ensembles.ensemble(results, kind).seeds)
        position, feature = grouped.medoid.T
        return pd.DataFrame(
            {
                "family": np.arange(len(grouped.size)),
                "size": grouped.size,
                "medoid_seed": seeds[position],
                "medoid_feature": feature,
                "mean_cosine": grouped.mean_cosine,
            }
        )

    return each_kind(results.cell.kinds, rows)


def unique(results: Results) -> pd.DataFrame:
    """How many families so many seeds meet, on average over the choices of seeds."""

    def rows(kind: str) -> pd.DataFrame:
        met = families(results, kind).unique()
        return pd.DataFrame({"seeds": np.arange(1, len(met) + 1), "families": met})

    return each_kind(results.cell.kinds, rows)


EXPERIMENT = Experiment("families", compute, after=("quality",), reads=("threshold",), tables={"families": sizes, "unique": unique})
