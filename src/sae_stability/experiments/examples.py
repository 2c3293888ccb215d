"""Features of the main cell in the contexts where they fire most: what the book shows of each band."""

from pathlib import Path

import pandas as pd

from sae_stability.evaluation import top_contexts
from sae_stability.experiments import ensembles, stability, texts
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import write_table
from sae_stability.language import models
from sae_stability.matching import BANDS

EXAMPLE_QUANTILES = (0.25, 0.5, 0.75)  # of firing frequency in a band: which features are shown
EXAMPLE_TOKENS = 200_000


def compute(results: Results, folder: Path) -> None:
    """Find where features of the first seed, chosen by rule from each band, fire most.

    A chosen feature that does not fire in the first `EXAMPLE_TOKENS` held-out tokens has no rows.
    """
    ensemble = ensembles.ensemble(results)
    table = stability.features_at(results, "real", results.cell.threshold)
    first = table[(table["seed"] == ensemble.seeds[0]) & table["alive"]]
    chosen: dict[int, str] = {}
    for band in BANDS:
        ranked = first[first["band"] == band].sort_values(["frequency", "feature"])["feature"].tolist()
        places = {round(quantile * (len(ranked) - 1)) for quantile in EXAMPLE_QUANTILES} if ranked else set()
        chosen |= {ranked[place]: band for place in sorted(places)}
    window = texts.activations(results, "evaluation").first(EXAMPLE_TOKENS)
    tokenizer, contexts = models.load_tokenizer(results.cell.model), texts.contexts(results, "evaluation")
    shown = top_contexts(ensemble, 0, list(chosen), window, contexts, tokenizer)
    shown.insert(0, "band", shown["feature"].map(chosen))
    shown = shown.merge(first[["feature", "stability", "matches", "trials", "frequency"]], on="feature")
    write_table(folder / "examples.parquet", shown)


def examples(results: Results) -> pd.DataFrame:
    """One row per token around the strongest firings of each chosen feature."""
    return pd.read_parquet(results.folder("examples") / "examples.parquet")


EXPERIMENT = Experiment(
    "examples",
    compute,
    after=("matching", "families", "quality"),
    reads=("threshold", "evaluation_tokens"),
    tables={"examples": examples},
    asked=is_main,
)
