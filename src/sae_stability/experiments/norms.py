"""The activations of the main cell before an SAE sees them: how long they are, and whether a few of them make the first axis."""

from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

from sae_stability.experiments import texts
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import write_table
from sae_stability.language import models, norms

DESCRIBED_TOKENS = 100_000
"""Held-out tokens whose norms are described."""
CUTOFF = 5.0
"""Medians from which a token is said to stand far out, where the recipe names no cutoff."""
COLUMNS = {"q0.01": "p1", "q0.25": "p25", "q0.5": "p50", "q0.75": "p75", "q0.99": "p99", "q1": "longest"}
SHOWN = 8  # tokens that stand far out, that are shown


def compute(results: Results, folder: Path) -> None:
    """Describe the norms of held-out activations, by position, and the principal axes with and without those that stand far out."""
    activations, contexts = texts.activations(results, "evaluation"), texts.contexts(results, "evaluation")
    rows = min(DESCRIBED_TOKENS, len(activations))
    context, position = (along[:rows] for along in np.nonzero(contexts.is_text))
    cutoff = results.cell.norm_cutoff or CUTOFF
    described = norms.describe(activations.data[:rows], position, contexts.tokens[context, position], cutoff)
    quantiles = described.quantiles.rename(columns=COLUMNS).assign(median=described.median, cutoff=cutoff)
    write_table(folder / "norms.parquet", quantiles)
    axes = {"share": described.variance, "share_without": described.variance_without}
    write_table(folder / "axes.parquet", pd.DataFrame({"axis": np.arange(1, len(described.variance) + 1), **axes}))
    tokenizer = models.load_tokenizer(results.cell.model)
    shown = described.outliers.head(SHOWN).drop(columns="row")
    text = [tokenizer.decode([token]) for token in shown["token"]]
    total = len(described.outliers)
    write_table(folder / "outliers.parquet", shown.assign(text=text, outliers=total, outlier_share=described.outlier_share))


def left_out(results: Results) -> float:
    """The share of the training tokens that were read and left out for their length; 0 without a cutoff."""
    if results.cell.norm_cutoff is None:
        return 0.0
    with safe_open(results.folder("activations/real") / "train.safetensors", "pt") as file:
        return float(1 - file.get_tensor("kept").float().mean())


def quantiles(results: Results) -> pd.DataFrame:
    """One row per position in the context, and one, at position -1, for all: percentiles and maximum of the norm, in medians."""
    return pd.read_parquet(results.folder("norms") / "norms.parquet").assign(left_out=left_out(results))


def axes(results: Results) -> pd.DataFrame:
    """One row per principal axis: its share of the variance, with and without the tokens that stand far out."""
    return pd.read_parquet(results.folder("norms") / "axes.parquet")


def outliers(results: Results) -> pd.DataFrame:
    """The longest of the tokens that stand far out, with their text, position and norm; how many there are, and their share."""
    return pd.read_parquet(results.folder("norms") / "outliers.parquet")


EXPERIMENT = Experiment(
    "norms",
    compute,
    reads=("evaluation_tokens",),
    tables={"norms": quantiles, "axes": axes, "outliers": outliers},
    asked=is_main,
)
