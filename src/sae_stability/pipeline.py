"""The stages of a study, from text to claims: the order in which they run, and what is computed again when something changes.

`plan` gives each stage a key that chains the keys before it, so a change recomputes what stands behind it and nothing else.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sae_stability import claims, explanations, stages, tables
from sae_stability.config import Cell, Study
from sae_stability.language import corpus, models
from sae_stability.results import (
    Source,
    effects_of,
    explanations_of,
    kinds_of,
    sources_of,
    stability_of,
    triggers_of,
)
from sae_stability.saes import fastest_dtype, files_of
from sae_stability.store import Store, fingerprint, key_of, versions, write_json

TEXT = ("language/corpus.py", "language/models.py")
ACTIVATIONS = ("language/activations.py",)
TRAINING = (
    *("training/__init__.py", "training/loop.py", "training/shards.py", "training/shuffling.py", "training/steering.py"),
    *("saes/__init__.py", "saes/ensemble.py", "saes/sparse.py", "saes/plain.py", "saes/compiled.py", "threads.py"),
)
STREAMING = ("language/activations.py", "language/streaming.py")
EVALUATION = ("evaluation.py", "language/interventions.py", "language/site.py", "statistics.py")
MATCHING = (
    *("matching/__init__.py", "matching/reappearance.py", "matching/pairs.py", "matching/criteria.py", "matching/assignment.py"),
    *("matching/families.py", "threads.py", *EVALUATION),
)
ABLATION = tuple(f"ablation/{name}.py" for name in ("__init__", "impact", "controls", "removal", "effects", "translation"))
TRIGGERS = ("triggers.py", "threads.py", *EVALUATION)
EXPLANATIONS = (
    *(f"explanations/{name}.py" for name in ("__init__", "windows", "rules", "language_model", "scoring")),
    *("evaluation.py", "matching/reappearance.py"),
)
TABLES = tuple(f"tables/{name}.py" for name in ("__init__", "columns", "stability", "function", "triggers"))
ANALYSIS = (*TABLES, *MATCHING, *ABLATION, *TRIGGERS, *EXPLANATIONS, "results.py")


@dataclass(frozen=True)
class Stage:
    """One result of a study: where it stands, what it depends on and what computes it."""

    name: str
    key: str
    compute: Callable[[Path], None]


def plan(study: Study) -> list[Stage]:
    """All stages of `study` in the order in which they run: what a user can get wrong is checked by the first ones."""
    planned: list[Stage] = []

    def add(name: str, compute: partial, inputs, modules: tuple[str, ...], before: list[str]) -> str:
        body = [inspect.getsource(part) for part in (compute.func, *stages.SHARED, _training_inputs)]
        key = key_of({"inputs": inputs, "compute": body, "threads": study.threads}, modules, before)
        planned.append(Stage(name, key, compute))
        return key

    sources = sources_of(study)
    of_text = {
        source: add(f"text/{source.folder}", partial(stages.read_text, source), _text_inputs(source), TEXT, [])
        for source in sources.values()
    }
    cached = {"dtype": study.dtype, "stream": study.stream}
    of_site = {
        source: add(f"activations/{source.folder}", partial(stages.run_model, study, source), cached, ACTIVATIONS, [key])
        for source, key in of_text.items()
    }
    of_random = {
        source: add(
            f"randomised/{source.folder}", partial(stages.run_randomised, study, source), cached, ACTIVATIONS, [of_text[source]]
        )
        for source in {sources[name]: None for name, cell in study.cells.items() if "randomised" in cell.nulls}
    }
    trained: dict[tuple[str, str], str] = {}
    if study.stream:
        for source in of_text:
            cells = {name: cell for name, cell in study.cells.items() if sources[name] == source}
            pairs = [(name, cell, kind) for name, cell in cells.items() for kind in kinds_of(cell)]
            inputs = {f"{name}/{kind}": _training_inputs(study, cell, kind) for name, cell, kind in pairs}
            modules = {module for cell in cells.values() for module in (*TRAINING, *STREAMING, *files_of(cell.variant))}
            before = [of_text[source]]
            key = add(
                f"streams/{source.folder}", partial(stages.train_streamed, study, source, cells), inputs, tuple(modules), before
            )
            trained |= {(name, kind): key for name, cell in cells.items() for kind in kinds_of(cell)}
    else:
        for name, cell in study.cells.items():
            for kind in kinds_of(cell):
                before = [of_random[sources[name]] if kind == "randomised" else of_site[sources[name]]]
                compute = partial(stages.train_cached, study, sources[name], cell, kind)
                modules = (*TRAINING, *files_of(cell.variant))
                trained[name, kind] = add(f"cells/{name}/{kind}", compute, _training_inputs(study, cell, kind), modules, before)
    evaluated = []
    several = len({cell.variant for cell in study.cells.values()}) > 1
    for name, cell in study.cells.items():
        held_out = [of[sources[name]] for of in (of_site, of_random) if sources[name] in of]
        before = [*(trained[name, kind] for kind in kinds_of(cell)), *held_out]
        compute = partial(stages.evaluate, study, sources[name], name, cell)
        key = add(f"cells/{name}/evaluation", compute, study.loss_tokens, EVALUATION, before)
        compute = partial(stages.match, study, sources[name], name, cell)
        matched = add(f"cells/{name}/matching", compute, [cell.threshold, stages.CODE_TOKENS], MATCHING, [key])
        evaluated += [key, matched]
        compute = partial(stages.find_triggers, study, sources[name], name, cell)
        evaluated.append(add(f"cells/{name}/triggers", compute, stages.TRIGGER_TOKENS, TRIGGERS, [matched]))
        if name == "main":
            asked = {
                "explainer": study.explainer and study.explainer.model_dump(),
                "of": [stages.TRIGGER_TOKENS, stages.EXPLAINED_SEEDS, stages.EXPLAINED],
            }
            compute = partial(stages.explain_features, study, sources[name])
            evaluated.append(add("cells/main/explanations", compute, asked, EXPLANATIONS, [matched]))
        compute = partial(stages.ablate, study, sources[name], name, cell)
        inputs = [study.ablation_tokens, study.loss_tokens, stages.CODE_TOKENS, stages.SAMPLED]
        evaluated.append(add(f"cells/{name}/ablation", compute, inputs, (*MATCHING, *ABLATION), [matched]))
        if several:
            compute = partial(stages.trace_frontier, study, sources[name], name, cell)
            before = [trained[name, "real"], of_site[sources[name]]]
            evaluated.append(add(f"cells/{name}/frontier", compute, {}, (*EVALUATION, *STREAMING), before))
    add("tables", partial(tables.write, study), study.model_dump(), ANALYSIS, evaluated)
    return planned


def compute(study: Study) -> Store:
    """Compute what is missing of `study`, up to its claims."""
    store = Store(study)
    if study.threads is not None:
        torch.set_num_threads(study.threads)
    write_json(store.folder / "study.json", study.model_dump(mode="json"))
    _compute_missing(store, plan(study))
    judge(study, store)
    return store


def check(study: Study) -> None:
    """Raise `UserError` for what the schema can't see: hook points and tokens. What is tokenised is kept for `compute`."""
    _compute_missing(Store(study), [stage for stage in plan(study) if stage.name.startswith("text/")])


def compute_activations(study: Study) -> None:
    """Compute what is missing of the text and the cached activations of `study`, and nothing behind them."""
    _compute_missing(Store(study), [stage for stage in plan(study) if stage.name.startswith(("text/", "activations/"))])


def _compute_missing(store: Store, planned: list[Stage]) -> None:
    for stage in planned:
        if not store.is_done(stage.name, stage.key):
            print(f"{store.study.name}: {stage.name}", flush=True)
            with store.computing(stage.name, stage.key) as folder:
                stage.compute(folder)


def judge(study: Study, store: Store) -> None:
    """Write the ledger of claims: all on the main cell, and those that are tested per cell on the others."""
    key = key_of({}, ("claims.py", *ANALYSIS), [store.provenance("tables")["key"]])
    if store.is_done("claims.json", key):
        return
    ledger = []
    for name, cell in study.cells.items():
        nulls = {kind: stability_of(store, name, kind) for kind in cell.nulls}
        (effects, sets), (surrogate, surrogate_sets) = (effects_of(store, name, kind) for kind in ("real", "surrogate"))
        ledger += [
            claims.judge_c1(stability_of(store, name, "real"), nulls, cell.label),
            claims.judge_c2(effects, surrogate, cell.label),
            claims.judge_c3(effects, sets, surrogate, cell.label),
            claims.judge_c4(effects, sets, surrogate, surrogate_sets, cell.label),
            claims.judge_c5(triggers_of(store, name), cell.label),
        ]
    main = study.cells["main"].label
    ledger += claims.judge_c6(explanations_of(store), main)
    tested = {line["id"] for line in ledger}
    ledger += [claims.not_tested(claim, main) for claim in claims.CLAIMS if claim not in tested]
    with store.computing_file("claims.json", key) as path:
        write_json(path, ledger)


def prompts(study: Study) -> Iterator[str]:
    """What the language model would be asked to explain, without asking it; what must be computed for that is kept."""
    behind = ("triggers", "explanations", "ablation", "frontier")
    first = ("text/", "activations/", "randomised/", "streams/", "cells/main/")
    needed = [stage for stage in plan(study) if stage.name.startswith(first) and not stage.name.endswith(behind)]
    _compute_missing(Store(study), needed)
    for _, given in stages.explanation_tasks(study, sources_of(study)["main"]):
        for task in given:
            yield "\n\n".join(message["content"] for message in explanations.explain_messages(task.shown))


def _training_inputs(study: Study, cell: Cell, kind: str) -> dict:
    """What an ensemble depends on: how it is evaluated, and other nulls, are not among it."""
    left_out = {"threshold", "evaluation_tokens", "nulls", "surrogate_seeds", "seeds"}
    machine = {"device": study.device, "fastest": str(fastest_dtype(torch.device(study.device))), "dtype": study.dtype}
    return {**cell.model_dump(exclude=left_out), "seeds": cell.seeds_of(kind), **machine}


def _text_inputs(source: Source) -> dict:
    """The source with what its paths hold now; the embedded corpus is what the installed packages hold."""
    packages = versions(corpus.EMBEDDED_PACKAGES) if source.corpus == corpus.EMBEDDED else fingerprint(source.corpus)
    return {"source": vars(source), "model": fingerprint(models.locate(source.model)), "corpus": packages}
