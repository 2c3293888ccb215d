"""How good the SAEs of a cell are: explained variance, L0 and dead features on held-out documents, and the model's loss with an SAE
spliced in. Beside them: how training went.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file

from sae_stability import evaluation
from sae_stability.evaluation import Fit, Losses
from sae_stability.experiments import ensembles, texts
from sae_stability.experiments.columns import each_kind, interval_columns
from sae_stability.experiments.experiment import Experiment, Results, Tables
from sae_stability.files import save_arrays

L0_TOLERANCE = 0.05


def compute(results: Results, folder: Path) -> None:
    """Judge the ensemble and its nulls on held-out activations, each on its own."""
    for kind in results.cell.kinds:
        contexts = texts.contexts(results, "evaluation", kind)
        cluster, held_out = contexts.cluster[contexts.is_text], texts.activations(results, "evaluation", kind)
        measured = evaluation.fit(ensembles.ensemble(results, kind), held_out, cluster)
        arrays = {**vars(measured), "firings": measured.firings.numpy(), "rows": np.array(measured.rows)}
        save_arrays(folder / f"{kind}.safetensors", arrays)
    spliced = evaluation.losses(texts.reading(results, results.study.loss_tokens), ensembles.ensemble(results))
    save_arrays(folder / "losses.safetensors", vars(spliced))


def fit(results: Results, kind: str = "real") -> Fit:
    return _fit(results.folder("quality") / f"{kind}.safetensors")


@lru_cache(maxsize=16)
def _fit(path: Path) -> Fit:
    arrays = load_file(path)
    firings, rows = torch.from_numpy(arrays.pop("firings")), int(arrays.pop("rows"))
    return Fit(firings, rows, **arrays)


def alive(results: Results, kind: str = "real") -> torch.Tensor:
    """Which features fire on held-out tokens, [seed, d_sae]; others are dead."""
    return fit(results, kind).firings > 0


def losses(results: Results) -> Losses:
    return Losses(**load_file(results.folder("quality") / "losses.safetensors"))


def saes(results: Results) -> pd.DataFrame:
    """One row per SAE: its quality on held-out documents."""
    measured, loss, living = fit(results), losses(results), alive(results)
    clean, zero, mean = (loss.per_token(sums).value for sums in (loss.clean, loss.zero, loss.mean))
    rows = []
    for position, seed in enumerate(ensembles.ensemble(results).seeds):
        rows.append(
            {
                "seed": seed,
                **interval_columns("explained_variance", measured.explained_variance(position)),
                "l0": float(measured.l0[position]),
                "l0_on_target": on_target(float(measured.l0[position]), results.cell.k),
                "dead": int((~living[position]).sum()),
                **interval_columns("loss_recovered", loss.recovered(position)),
                "loss_spliced": loss.per_token(loss.spliced[position]).value,
                "loss_clean": clean,
                "loss_mean_ablated": mean,
                "loss_zero_ablated": zero,
                "training_seconds": ensembles.seconds(results) / len(results.cell.seed_list),
            }
        )
    return pd.DataFrame(rows)


def curve(results: Results) -> pd.DataFrame:
    """The training curve: one row per seed and point."""
    return each_kind(results.cell.kinds, lambda kind: ensembles.curve(results, kind))


def on_target(l0: float, k: int) -> bool:
    """Whether an L0 on held-out tokens is the one that the cell was to be brought to, within `L0_TOLERANCE`."""
    return abs(l0 - k) <= L0_TOLERANCE * k


def mean_explained(measured: Fit) -> float:
    """Explained variance on held-out tokens, on average over seeds."""
    return float(1 - measured.residual.sum(1).mean() / measured.total.sum())


def across(tables: Tables) -> Tables:
    """Flag the cells that miss their L0 wherever they appear."""
    hit = tables["cells"].set_index("cell")["l0_on_target"]
    return {name: table.assign(cell_on_target=table["cell"].map(hit)) for name, table in tables.items()}


EXPERIMENT = Experiment(
    "quality",
    compute,
    reads=("evaluation_tokens", "loss_tokens"),
    tables={"saes": saes, "curve": curve},
    across=across,
)
