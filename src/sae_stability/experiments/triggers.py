"""What features fire on, in activation statistics (C5)."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from sae_stability import threads, triggers
from sae_stability.evaluation import sparse_codes
from sae_stability.experiments import ensembles, matching, quality, texts
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import write_table
from sae_stability.language import models
from sae_stability.language.activations import Activations
from sae_stability.language.corpus import Contexts
from sae_stability.language.tokens import vocabulary
from sae_stability.ledger import MOST, NOWHERE, OTHERWISE, Condition, Rule, judged
from sae_stability.matching import BANDS, Banding
from sae_stability.statistics import Interval

TRIGGER_TOKENS = 300_000
"""Held-out tokens on which it is asked what features fire on."""
DEFINITIONS = {"strict": triggers.SURFACE, "with bundles": triggers.WITH_BUNDLES}
"""Two readings of surface form: whether a bundle of tokens that have no form in common is one."""

C5 = (
    Rule(
        "C5",
        "share of the unstable features whose trigger is of surface form, by a written rule",
        f"supported in this model if the 95 % intervals over seeds and text lie on their side of the bounds: the statistic above "
        f"{MOST:g} and above the same share of stable features; Cliff's delta of unstable against stable features below 0 for "
        "firing frequency, of all live features, and above 0 for the rarity of the trigger tokens; "
        f"{OTHERWISE}. Where bundles of tokens count as surface form too and the verdict is another, it depends on the definition",
    ),
    Rule(
        "C5",
        "share of the unstable features of surface form, less that of the same features in a text whose tokens are shuffled",
        f"supported in this model if the 95 % interval over seeds and text lies above 0; {OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C5",
        "Cliff's delta of unstable against stable features that fire as often, in what the token tells of their variance",
        f"supported in this model if the 95 % interval over seeds and text lies above 0; {OTHERWISE}",
        "beyond energy and frequency",
    ),
)


def compute(results: Results, folder: Path) -> None:
    """Ask of every feature of the ensemble what it fires on: nothing here knows its band."""
    held_out, text, words, frequency = reading(results)
    ensemble = ensembles.ensemble(results)

    def of_seed(position: int) -> dict[str, pd.DataFrame]:
        (codes,) = sparse_codes(ensemble.of(position), held_out)
        found = {}
        for name, ask in (("triggers", triggers.triggers), ("without", triggers.without_parts)):
            found[name] = ask(codes, text, words, frequency).assign(seed=ensemble.seeds[position])
        return found

    by_seed = threads.each_seed(of_seed, len(ensemble.seeds), "triggers")
    for name in ("triggers", "without"):
        write_table(folder / f"{name}.parquet", pd.concat([found[name] for found in by_seed], ignore_index=True))


def reading(results: Results) -> tuple[Activations, triggers.Text, list[str], Float[np.ndarray, "vocabulary"]]:
    """What is asked for triggers: held-out activations, their text, the tokens as text and their share of the training corpus."""
    tokenizer = models.load_tokenizer(results.cell.model)
    held_out = texts.activations(results, "evaluation").first(TRIGGER_TOKENS)
    text = triggers.Text.of(texts.contexts(results, "evaluation"), len(held_out))
    seen = training_shares(texts.contexts(results, "train"), text.token, len(tokenizer))
    return held_out, text, vocabulary(tokenizer, len(seen)), seen


def training_shares(train: Contexts, held_out: Int[np.ndarray, "token"], vocabulary_size: int) -> Float[np.ndarray, "vocabulary"]:
    """The share of each token of the vocabulary in the training text; behind gaps in its ids held-out text may hold larger ones."""
    size = max(vocabulary_size, int(held_out.max(initial=0)) + 1)
    seen = np.bincount(train.tokens[train.is_text], minlength=size)
    return seen / seen.sum()


def bands(results: Results) -> Banding:
    return Banding(matching.stability(results), ensembles.ensemble(results).seeds)


def by_band(results: Results) -> pd.DataFrame:
    """One row per live feature of the ensemble: what it fires on, how often, and its band."""
    matched, frequency = matching.stability(results), quality.fit(results).frequency
    table = pd.read_parquet(results.folder("triggers") / "triggers.parquet")
    table = bands(results).banded(table)
    table["stability"], table["frequency"] = matched.probability.numpy().ravel(), frequency.numpy().ravel()
    return table[matched.alive.numpy().ravel()].reset_index(drop=True)


def without_parts(results: Results) -> list[pd.DataFrame]:
    """The features as found without each part of the text in turn, with the null of the whole.

    Their frequency is that on the tokens that are left, and not that on all held-out tokens.
    """
    whole = pd.read_parquet(results.folder("triggers") / "triggers.parquet")
    null = whole[["seed", "feature", *(column for column in whole if column.startswith("null_"))]]
    parts = pd.read_parquet(results.folder("triggers") / "without.parquet").groupby("left_out")
    return [part.merge(null, on=["seed", "feature"]) for _, part in parts]


def features(results: Results) -> pd.DataFrame:
    """One row per live feature: what tells when it fires, and whether it is among those compared at equal frequency."""
    table = by_band(results)
    chosen = triggers.paired(table[table["firings"] >= triggers.FEWEST])
    return table.assign(equal_frequency=table.index.isin(chosen.index))


def deltas(results: Results) -> pd.DataFrame:
    """One row per quantity: how unstable features differ from stable ones."""
    return triggers.compare(by_band(results), bands(results), without_parts(results))


def surface(results: Results) -> pd.DataFrame:
    """The share of the triggers of each band that are of surface form, strictly and with bundles of tokens."""
    table, parts, rows = by_band(results), without_parts(results), []
    for band, (definition, classes) in product(BANDS, DEFINITIONS.items()):
        share = triggers.surface_share(table, bands(results), band, classes=classes, parts=parts)
        rows.append({"band": band, "definition": definition, **interval_columns("share", share)})
    return pd.DataFrame(rows)


def judge(results: Results) -> list[dict]:
    return judge_c5(by_band(results), bands(results), without_parts(results))


def judge_c5(features: pd.DataFrame, bands: Banding, parts: triggers.Parts = None) -> list[dict]:
    """C5 on one cell, from the triggers of its features, and those found without each part of the text.

    The null's value is that of a text whose tokens are shuffled.
    """
    stated, beyond_noise, beyond_frequency = C5
    frequency, rarity = (triggers.delta(features, bands, quantity, parts=parts) for quantity in ("frequency", "rarity"))

    def conditions(classes: tuple[str, ...]) -> list[Condition]:
        share = triggers.surface_share(features, bands, "unstable", classes=classes, parts=parts)
        more = triggers.surface_share(features, bands, "unstable", less="stable", classes=classes, parts=parts)
        return [
            Condition("unstable features with a trigger of surface form", share, MOST, no_effect=0.0),
            Condition("the same, less that of stable features", more, 0.0),
            Condition("Cliff's delta of firing frequency", frequency, 0.0, below=True),
            Condition("Cliff's delta of the rarity of the trigger tokens", rarity, 0.0),
        ]

    strict = conditions(triggers.SURFACE)
    shuffled = Interval(triggers.by_chance(features, "unstable"), math.nan, math.nan)
    by_chance = triggers.surface_share(features, bands, "unstable", less="shuffled", parts=parts)
    token = triggers.delta(features, bands, "explained_token", equal_frequency=True, parts=parts)
    return [
        judged(stated, strict[0].interval, shuffled, strict, conditions(triggers.WITH_BUNDLES)),
        judged(beyond_noise, by_chance, shuffled, [Condition("surface form, less that by chance", by_chance, 0.0)]),
        judged(beyond_frequency, token, NOWHERE, [Condition("delta of what the token tells, at equal frequency", token, 0.0)]),
    ]


EXPERIMENT = Experiment(
    "triggers",
    compute,
    reads=("evaluation_tokens",),
    tables={"triggers": features, "deltas": deltas, "surface": surface},
    claims=judge,
    report_after=("matching", "quality"),
    report_reads=("threshold",),
)
