"""Variants at equal quality: how many features a token a cell would need to explain as much variance as the study's main cell.

Where a study has several variants, each cell trains two pilots beside its ensemble, one sparser and one denser.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sae_stability import evaluation, training
from sae_stability.experiments import ensembles, texts
from sae_stability.experiments.experiment import Experiment, Results, Tables
from sae_stability.files import read_json, write_json
from sae_stability.study import Cell, Study


def compute(results: Results, folder: Path) -> None:
    """Train a sparser and a denser pilot, and judge them on held-out activations."""
    device, coefficient = torch.device(results.study.device), ensembles.ensemble(results).coefficient
    pilots = training.sparser_and_denser(results.cell.recipe, ensembles.blocks(results), coefficient, folder, device)
    held_out, contexts = texts.activations(results, "evaluation"), texts.contexts(results, "evaluation")
    measured = [evaluation.fit(pilot, held_out, contexts.cluster[contexts.is_text]) for pilot in pilots]
    rows = [{"l0": pilot.l0[0].item(), "explained_variance": pilot.explained_variance(0).value} for pilot in measured]
    write_json(folder / "pilots.json", rows)


def pilots(results: Results) -> pd.DataFrame:
    """One row per pilot: its L0 and explained variance on held-out tokens."""
    rows = read_json(results.folder("frontier") / "pilots.json")
    return pd.DataFrame(rows, columns=["l0", "explained_variance"])


def across(tables: Tables) -> Tables:
    """Add to `cells` the L0 at which each cell would explain as much variance as the main one; NaN beyond what was trained."""
    cells, trained = tables["cells"], tables.get("pilots", pd.DataFrame(columns=["cell", "l0", "explained_variance"]))
    wanted = cells["explained_variance"].iloc[0]
    points = {
        row.cell: pd.concat([trained[trained["cell"] == row.cell], cells[cells["cell"] == row.cell]], ignore_index=True)
        for row in cells.itertuples()
    }
    equal = [at_equal_quality(points[cell], wanted) for cell in cells["cell"]]
    return tables | {"cells": cells.assign(l0_at_equal_quality=equal)}


def at_equal_quality(points: pd.DataFrame, wanted: float) -> float:
    """The L0 at which a cell explains the variance `wanted`, read off between its ensemble and its pilots.

    Columns of `points`: l0, explained_variance. Piecewise linear in log L0; NaN outside of them.
    """
    ordered = points.sort_values("explained_variance")
    logs = np.log(ordered["l0"].to_numpy(dtype=float))
    return float(np.exp(np.interp(wanted, ordered["explained_variance"], logs, left=np.nan, right=np.nan)))


def _several_variants(study: Study, cell: Cell) -> bool:
    return len({other.variant for other in study.cells.values()}) > 1


EXPERIMENT = Experiment(
    "frontier",
    compute,
    reads=("evaluation_tokens",),
    tables={"pilots": pilots},
    asked=_several_variants,
    across=across,
)
