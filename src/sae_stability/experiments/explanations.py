"""What features fire on, in words (C6): features of the main cell, explained by rules and by a language model if there is one."""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from sae_stability import explanations
from sae_stability.errors import UserError
from sae_stability.evaluation import sparse_codes
from sae_stability.experiments import ensembles, matching, texts, triggers
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.triggers import TRIGGER_TOKENS
from sae_stability.explanations import Rules
from sae_stability.files import fingerprint, write_table
from sae_stability.language import models
from sae_stability.language.tokens import pieces
from sae_stability.ledger import MOST, Condition, Rule, judged
from sae_stability.matching import BANDS, Banding
from sae_stability.saes import fastest_dtype
from sae_stability.study import Study

EXPLAINED_SEEDS, EXPLAINED = 4, 15  # seeds of the cell, and features of each band of each, that are explained

CHANCE = 0.5  # balanced accuracy of whoever guesses

C6 = Rule(
    "C6",
    "share of the unstable features whose explanation by a language model is of surface form, by a written rule",
    f"supported in this model if the 95 % intervals over seeds lie above their bounds: the statistic above {MOST:g}, and above the "
    "same share of stable features; weaker than the bound if one misses it, opposite if fewer are than of the stable ones, and "
    "inconclusive otherwise; not tested unless a language model that does not see the band wrote the explanations, and these tell "
    f"where features fire: the balanced accuracy of detection lies above {CHANCE:g}",
)


def tasks(results: Results) -> Iterator[tuple[int, list[explanations.Task]]]:
    """For some seeds of the cell, what engines are given: features of every band, in an order that does not tell which."""
    tokenizer, contexts = models.load_tokenizer(results.cell.model), texts.contexts(results, "evaluation")
    held_out = texts.activations(results, "evaluation").first(TRIGGER_TOKENS)
    ensemble, matched = ensembles.ensemble(results), matching.stability(results)
    for position, seed in enumerate(ensemble.seeds[:EXPLAINED_SEEDS]):
        rng = np.random.default_rng(seed)
        bands = [np.flatnonzero(matched.band[position] == band) for band in range(len(BANDS))]
        chosen = np.concatenate([rng.permutation(features)[:EXPLAINED] for features in bands])
        (codes,) = sparse_codes(ensemble.of(position), held_out)
        yield seed, explanations.tasks(codes.tocsc(), rng.permutation(chosen), contexts, partial(pieces, tokenizer))


def prompts(results: Results) -> Iterator[str]:
    """What a language model would be asked to explain, without asking it."""
    for _, given in tasks(results):
        for task in given:
            yield "\n\n".join(message["content"] for message in explanations.explain_messages(task.shown))


def compute(results: Results, folder: Path) -> None:
    """Explain some features by rules, and by the study's language model where it has one.

    A budget that is spent ends the explanations of the language model, and keeps those that there are.
    """
    engines: list[explanations.Engine] = [Rules()]
    if results.study.explainer is not None:
        engines.append(language_model(results.study, results.store.folder / "answers"))
    rows: list[dict] = []
    failed: list[dict] = []
    for seed, given in tasks(results):
        for engine in list(engines):
            if isinstance(engine, explanations.LocalModel):
                ahead = tqdm(total=len(given), desc=f"answers of {engine.name}, seed {seed}", unit="feature", disable=None)
                for answered in engine.explain_ahead(task.shown for task in given if task.shown):
                    ahead.update(answered)
            progress = tqdm(given, f"explanations by {engine.name}, seed {seed}", unit="feature", disable=None)
            left_out: dict[int, str] = {}
            try:
                for explained in explanations.explain(engine, progress, left_out):  # each is kept, whatever happens to the next
                    rows.append({"seed": seed, "engine": engine.name, **explained.row})
            except explanations.BudgetSpent as reason:
                print(f"{results.study.name}: explainer.budget: {reason}; raise it to explain more features", flush=True)
                engines.remove(engine)
            of_engine = {"seed": seed, "engine": engine.name}
            failed += [{**of_engine, "feature": feature, "reason": why} for feature, why in left_out.items()]
    columns = ["seed", "engine", *(field.name for field in fields(explanations.Explanation))]
    write_table(folder / "explanations.parquet", pd.DataFrame(rows, columns=columns))
    write_table(folder / "left_out.parquet", pd.DataFrame(failed, columns=["seed", "engine", "feature", "reason"]))


def language_model(study: Study, answers: Path) -> explanations.Engine:
    """What a study asks to explain features: an endpoint, or a chat model on this machine, where the study's device is."""
    assert study.explainer is not None
    if study.explainer.base_url is not None:
        return explanations.LanguageModel(study.explainer, answers)
    return explanations.LocalModel(study.explainer.model, answers, study.device, fastest_dtype(torch.device(study.device)))


def weights(study: Study) -> str | dict[str, str] | None:
    """What the files of a chat model on this machine hold; one of the hub stands for itself. Raises `UserError` where there is none
    of that name."""
    if study.explainer is None or study.explainer.base_url is not None:
        return None
    try:
        return fingerprint(models.locate(study.explainer.model))
    except UserError as error:
        raise UserError(f"explainer.{error}") from None


def by_band(results: Results) -> pd.DataFrame:
    """One row per engine and explained feature, with its band: engines do not know it."""
    return triggers.bands(results).banded(pd.read_parquet(results.folder("explanations") / "explanations.parquet"))


def left_out(results: Results) -> pd.DataFrame:
    """One row per feature that an engine could not explain, with the reason."""
    return pd.read_parquet(results.folder("explanations") / "left_out.parquet")


def judge(results: Results) -> list[dict]:
    return judge_c6(by_band(results), triggers.bands(results))


def judge_c6(explained: pd.DataFrame, bands: Banding) -> list[dict]:
    """C6 on one cell, by what language models wrote; no line where none did. The null's value is that of stable features.

    Explanations that do not tell where features fire better than chance say nothing of features: with them C6 is not tested.
    """
    by_model = explained[explained["engine"] != Rules.name]
    if by_model.empty:
        return []

    def share(part: pd.DataFrame, band: str) -> float:
        return part.loc[part["band"] == band, "surface"].mean()

    unstable, stable = (bands.jackknife(by_model, partial(share, band=band)) for band in ("unstable", "stable"))
    more = bands.jackknife(by_model, lambda part: share(part, "unstable") - share(part, "stable"))
    told = Condition("balanced accuracy of detection by the explanations", bands.jackknife(by_model, _told), CHANCE)
    conditions = [
        Condition("explanations of unstable features of surface form", unstable, MOST, no_effect=0.0),
        Condition("the same, less that of stable features", more, 0.0),
    ]
    return [judged(C6, unstable, stable, conditions, needed=[told])]


def _told(part: pd.DataFrame) -> float:
    return part["balanced_accuracy"].mean()


EXPERIMENT = Experiment(
    "explanations",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens", "explainer"),
    content=weights,
    tables={"explanations": by_band, "not_explained": left_out},
    claims=judge,
    asked=is_main,
)
