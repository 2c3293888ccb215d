"""What features fire on, in activation statistics (C5)."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from sae_stability import threads, triggers
from sae_stability.evaluation import sparse_codes
from sae_stability.experiments import ensembles, matching, quality, texts
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import write_table
from sae_stability.language import models
from sae_stability.ledger import MOST, Condition, Rule, judged
from sae_stability.matching import BANDS
from sae_stability.statistics import Interval

TRIGGER_TOKENS = 400_000
"""Held-out tokens on which it is asked what features fire on."""

C5 = Rule(
    "C5",
    "share of the unstable features whose trigger is of surface form, by a written rule",
    "supported in this model if the 95 % intervals over seeds lie on their side of the bounds: the statistic above "
    f"{MOST:g}; Cliff's delta of unstable against stable features below 0 for firing frequency, and above 0 for the share of the "
    "variance that the token tells, among all of them and among those that fire equally often; not supported if one fails; "
    "inconclusive otherwise",
)


def compute(results: Results, folder: Path) -> None:
    """Ask of every feature of the ensemble what it fires on: nothing here knows its band."""
    tokenizer = models.load_tokenizer(results.cell.model)
    held_out = texts.activations(results, "evaluation").first(TRIGGER_TOKENS)
    text = triggers.Text.of(texts.contexts(results, "evaluation"), len(held_out))
    train = texts.contexts(results, "train")
    seen = np.bincount(train.tokens[train.is_text], minlength=len(tokenizer))
    words = [tokenizer.decode([token]) for token in range(len(seen))]
    ensemble = ensembles.ensemble(results)

    def of_seed(position: int) -> pd.DataFrame:
        (codes,) = sparse_codes(ensemble.of(position), held_out)
        table = triggers.triggers(codes, text, words, seen / seen.sum())
        return table.assign(seed=ensemble.seeds[position], feature=np.arange(len(table)))

    parts = threads.each_seed(of_seed, len(ensemble.seeds), "triggers")
    write_table(folder / "triggers.parquet", pd.concat(parts, ignore_index=True))


def by_band(results: Results) -> pd.DataFrame:
    """One row per live feature of the ensemble: what it fires on, how often, and its band."""
    matched, frequency = matching.stability(results), quality.fit(results).frequency
    table = pd.read_parquet(results.folder("triggers") / "triggers.parquet")
    table["band"] = np.array([*BANDS, "dead"])[matched.band].ravel()
    table["stability"], table["frequency"] = matched.probability.numpy().ravel(), frequency.numpy().ravel()
    return table[matched.alive.numpy().ravel()].reset_index(drop=True)


def features(results: Results) -> pd.DataFrame:
    """One row per live feature: what tells when it fires, and whether it is among those compared at equal frequency."""
    table = by_band(results)
    chosen = pd.concat([triggers.at_equal_frequency(part) for _, part in table.groupby("seed")]).index
    return table.assign(equal_frequency=table.index.isin(chosen))


def deltas(results: Results) -> pd.DataFrame:
    """One row per quantity: how unstable features differ from stable ones."""
    return triggers.compare(by_band(results))


def judge(results: Results) -> list[dict]:
    return [judge_c5(by_band(results))]


def judge_c5(features: pd.DataFrame) -> dict:
    """C5 on one cell, from the triggers of its features. The null's value is that of a text whose tokens are shuffled."""
    compared = triggers.compare(features).set_index(["features", "quantity"])

    def delta(chosen: str, quantity: str) -> Interval:
        row = compared.loc[(chosen, quantity)]
        return Interval(row["delta"], row["delta_low"], row["delta_high"])

    value = triggers.surface_share(features, "unstable")
    token, equal = (delta(chosen, "explained_token") for chosen in ("all", "equal frequency"))
    conditions = [
        Condition("unstable features with a trigger of surface form", value, MOST),
        Condition("Cliff's delta of firing frequency", delta("all", "frequency"), 0.0, below=True),
        Condition("Cliff's delta of what the token tells", token, 0.0),
        Condition("Cliff's delta of what the token tells, at equal frequency", equal, 0.0, control=True),
    ]
    null = Interval(triggers.shuffled_share(features, "unstable"), math.nan, math.nan)
    return judged(C5, value, null, conditions)


EXPERIMENT = Experiment(
    "triggers",
    compute,
    reads=("evaluation_tokens",),
    tables={"triggers": features, "deltas": deltas},
    claims=judge,
    report_after=("matching", "quality"),
    report_reads=("threshold",),
)
