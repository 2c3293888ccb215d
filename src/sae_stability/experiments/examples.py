"""Features of the main cell as readers look at them: in the contexts where they fire, and by which tokens they make likelier.

The feature explorer shows those of the first `EXPLORED` seeds, and the chapter on stability some of each band.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from sae_stability import portraits, threads
from sae_stability.experiments import ensembles, stability, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import write_table
from sae_stability.language import models
from sae_stability.language.corpus import Contexts
from sae_stability.language.tokens import pieces, vocabulary
from sae_stability.matching import BANDS

EXAMPLE_QUANTILES = (0.25, 0.5, 0.75)  # of firing frequency in a band: which features are shown
EXPLORED = 12
"""Seeds at most whose features can be looked at one by one."""
ON_A_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Ends of the names of hook points from which a direction goes straight to the end of the model."""


def compute(results: Results, folder: Path) -> None:
    """Look up where each feature fires, and what it writes."""
    ensemble, contexts = ensembles.ensemble(results), texts.contexts(results, "evaluation")
    read = encoded(results)
    tokenizer = models.load_tokenizer(results.cell.model)
    bridge = models.load(results.cell.model) if results.cell.hook_name.endswith(ON_A_STREAM) else None

    def of_seed(position: int) -> None:
        codes = read.matrix(position).tocsc()
        write_table(folder / f"windows-{position}.parquet", portraits.windows(codes, contexts))
        table = portraits.histograms(codes)
        if bridge is not None:
            table = table.merge(portraits.logit_effects(bridge, ensemble.W_dec[position]), on="feature")
        write_table(folder / f"features-{position}.parquet", table)

    threads.each_seed(of_seed, min(EXPLORED, len(ensemble.seeds)), "contexts of features")
    write_table(folder / "text.parquet", pd.DataFrame({"token": _text(contexts, len(read.activations), tokenizer)}))
    words = vocabulary(tokenizer, 0 if bridge is None else bridge.cfg.d_vocab)
    write_table(folder / "vocabulary.parquet", pd.DataFrame({"token": words}))


def _text(contexts: Contexts, count: int, tokenizer) -> list[str]:
    """Each of the first text tokens as text, as it is read in its context."""
    told: list[str] = []
    for tokens, is_text in zip(contexts.tokens, contexts.is_text, strict=True):
        if len(told) >= count:
            break
        told += pieces(tokenizer, tokens[is_text])
    return told[:count]


def seen(results: Results, position: int) -> pd.DataFrame:
    """The windows of the seed at a position: those of `portraits.windows`, with `tokens` as text."""
    text = pd.read_parquet(results.folder("examples") / "text.parquet")["token"].to_numpy()
    windows = pd.read_parquet(results.folder("examples") / f"windows-{position}.parquet")
    spans = zip(windows["first"], windows["activations"], strict=True)
    return windows.assign(tokens=[text[first : first + len(activations)] for first, activations in spans])


def examples(results: Results) -> pd.DataFrame:
    """Features of the first seed, chosen by rule from each band: one row per token around their strongest firings.

    A chosen feature that does not fire in the first `CODE_TOKENS` held-out tokens has no rows.
    """
    table = stability.features_at(results, "real", results.cell.threshold)
    first = table[(table["seed"] == table["seed"].iloc[0]) & table["alive"]]
    chosen: list[int] = []
    for band in BANDS:
        ranked = first[first["band"] == band].sort_values(["frequency", "feature"])["feature"].tolist()
        places = {round(quantile * (len(ranked) - 1)) for quantile in EXAMPLE_QUANTILES} if ranked else set()
        chosen += [ranked[place] for place in sorted(places)]
    shown = seen(results, 0).set_index("feature").loc[lambda windows: windows.index.isin(chosen) & (windows["rank"] > 0)]
    shown = shown.loc[[feature for feature in chosen if feature in shown.index]].reset_index()
    before = shown["peak"] - shown["first"]
    shown["offset"] = [np.arange(len(tokens)) - of_peak for tokens, of_peak in zip(shown["tokens"], before, strict=True)]
    rows = shown.explode(["tokens", "activations", "offset"]).rename(columns={"tokens": "token", "activations": "activation"})
    rows = rows.astype({"activation": float, "offset": int}).drop(columns=["first", "peak"])
    return rows.merge(first[["feature", "band", "stability", "matches", "trials", "frequency"]], on="feature")


EXPERIMENT = Experiment(
    "examples",
    compute,
    reads=("evaluation_tokens",),
    tables={"examples": examples},
    asked=is_main,
    report_after=("matching", "families", "quality"),
    report_reads=("threshold",),
)
