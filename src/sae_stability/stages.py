"""The stages of a study, from text to claims, and the order in which they run.

Each stage is a plain function that fills a folder. `plan` gives each a key that chains the keys before it, so a change
recomputes what stands behind it and nothing else.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_stability import claims, tables, training
from sae_stability.config import Cell, Study, UserError
from sae_stability.evaluation import fit, losses
from sae_stability.language import corpus, models
from sae_stability.language.activations import Activations, collect, draw_surrogate
from sae_stability.results import KINDS, Source, activations_of, contexts_of, ensemble_of, sources_of, stability_of
from sae_stability.store import Store, fingerprint, key_of, versions, write_json

CHARACTERS_A_TOKEN = 8  # more than tokenizers pack on average: how much of a large dataset is read

TEXT = ("language/corpus.py", "language/models.py")
ACTIVATIONS = ("language/activations.py",)
TRAINING = ("training.py", "saes/__init__.py", "saes/ensemble.py")
EVALUATION = ("evaluation.py", "statistics.py")
ANALYSIS = ("tables.py", "matching.py", "statistics.py", "results.py")


@dataclass(frozen=True)
class Stage:
    """One result of a study: where it stands, what it depends on and what computes it."""

    name: str
    key: str
    compute: Callable[[Path], None]


def plan(study: Study) -> list[Stage]:
    """All stages of `study` in the order in which they run: what a user can get wrong is checked by the first ones."""
    stages: list[Stage] = []

    def add(name: str, compute: partial, inputs, modules: tuple[str, ...], before: list[str]) -> str:
        body = inspect.getsource(compute.func)
        key = key_of({"inputs": inputs, "compute": body, "threads": study.threads}, modules, before)
        stages.append(Stage(name, key, compute))
        return key

    sources = sources_of(study)
    of_text = {
        source: add(f"text/{source.folder}", partial(read_text, source), _text_inputs(source), TEXT, [])
        for source in sources.values()
    }
    of_site = {
        source: add(f"activations/{source.folder}", partial(run_model, study, source), study.dtype, ACTIVATIONS, [key])
        for source, key in of_text.items()
    }
    evaluated = []
    for name, cell in study.cells.items():
        source = sources[name]
        modules = (*TRAINING, f"saes/{cell.variant}.py")
        inputs = cell.model_dump(exclude={"threshold", "evaluation_tokens"})
        before = [of_site[source]]
        real = add(f"cells/{name}/real", partial(train_real, study, source, cell), inputs, modules, before)
        null = add(f"cells/{name}/surrogate", partial(train_surrogate, study, source, cell), inputs, modules, before)
        evaluated.append(
            add(
                f"cells/{name}/evaluation",
                partial(evaluate, study, source, name, cell),
                study.loss_tokens,
                EVALUATION,
                [real, null],
            )
        )
    add("tables", partial(tables.write, study), study.model_dump(), ANALYSIS, evaluated)
    return stages


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


def _compute_missing(store: Store, stages: list[Stage]) -> None:
    for stage in stages:
        if not store.is_done(stage.name, stage.key):
            print(f"{store.study.name}: {stage.name}", flush=True)
            with store.computing(stage.name, stage.key) as folder:
                stage.compute(folder)


def judge(study: Study, store: Store) -> None:
    """Write the ledger of claims on the main cell."""
    key = key_of({}, ("claims.py", *ANALYSIS), [store.provenance("tables")["key"]])
    if store.is_done("claims.json", key):
        return
    cell = study.cells["main"]
    real, surrogate = (stability_of(store, "main", kind) for kind in KINDS)
    ledger = [claims.judge_c1(real, surrogate, cell.label)]
    ledger += [claims.not_tested(claim, cell.label) for claim in claims.CLAIMS if claim != "C1"]
    with store.computing_file("claims.json", key) as path:
        write_json(path, ledger)


def read_text(source: Source, folder: Path) -> None:
    """Check the model's hook points, then split, tokenise and pack the corpus.

    Raises `UserError` for a hook that the model lacks and for more tokens than the corpus has.
    """
    bridge = models.load(source.model)
    for hook_name in source.hook_names:
        models.check_hook(bridge, hook_name)
    context = models.context_length(bridge, source.context)
    wanted = source.tokens + source.evaluation_tokens
    text = corpus.load(source.corpus, characters=CHARACTERS_A_TOKEN * wanted)
    packed = {
        split: corpus.pack(documents, bridge.tokenizer, context)
        for split, documents in (("train", text.train), ("evaluation", text.evaluation))
    }
    found = int(packed["train"].is_text.sum())
    if found < source.tokens:
        raise UserError(
            f"tokens: {source.corpus} has {found:,} training tokens, not {source.tokens:,}; lower tokens, or raise passes"
        )
    if not packed["evaluation"].is_text.any():
        raise UserError(f"corpus: the held-out documents of {source.corpus} fill no context of {context} tokens; give more text")
    for split, contexts in packed.items():
        arrays = {"tokens": contexts.tokens, "document": contexts.document, "is_text": contexts.is_text}
        save_file(arrays, folder / f"{split}.safetensors")
    facts = {
        "corpus": source.corpus,
        "corpus_sha256": text.sha256,
        "train_documents": len(text.train),
        "evaluation_documents": len(text.evaluation),
        "train_tokens": found,
        "evaluation_tokens": int(packed["evaluation"].is_text.sum()),
        "context": context,
        "layers": bridge.cfg.n_layers,
        "d_model": bridge.cfg.d_model,
        "vocabulary": bridge.cfg.d_vocab,
    }
    write_json(folder / "facts.json", facts)


def run_model(study: Study, source: Source, folder: Path) -> None:
    """Cache activations of every site of the source, and Gaussian surrogates of them."""
    bridge = models.load(source.model)
    store = Store(study)
    for split, tokens in (("train", source.tokens), ("evaluation", source.evaluation_tokens)):
        paths = {hook_name: folder / hook_name / f"{split}.bin" for hook_name in source.hook_names}
        collect(bridge, contexts_of(store, source, split), paths, tokens, getattr(torch, study.dtype), f"activations, {split}")
    for hook_name in source.hook_names:
        real = Activations.open(folder / hook_name / "train.bin")
        held_out = len(Activations.open(folder / hook_name / "evaluation.bin"))
        for seed, (split, rows) in enumerate((("train", source.tokens), ("evaluation", held_out))):
            draw_surrogate(real, folder / hook_name / f"surrogate-{split}.bin", rows, seed, f"surrogate, {split}")


def train_real(study: Study, source: Source, cell: Cell, folder: Path) -> None:
    training.train(cell, activations_of(Store(study), source, cell, "train"), cell.seed_list, folder, "training")


def train_surrogate(study: Study, source: Source, cell: Cell, folder: Path) -> None:
    """The null: the same training, from the first of the same seeds, on Gaussian data with the activations' mean and covariance."""
    data = activations_of(Store(study), source, cell, "surrogate-train")
    training.train(cell, data, cell.seed_list[: cell.surrogate_seeds], folder, "training, surrogate")


def evaluate(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Measure real and surrogate SAEs on held-out tokens, and the model's loss with the real ones spliced in."""
    store = Store(study)
    contexts = contexts_of(store, source, "evaluation")
    document = contexts.document[contexts.is_text]
    for kind, split in (("real", "evaluation"), ("surrogate", "surrogate-evaluation")):
        measured = fit(ensemble_of(store, name, kind), activations_of(store, source, cell, split), document)
        save_file(
            {**vars(measured), "firings": measured.firings.numpy(), "rows": np.array(measured.rows)},
            folder / f"{kind}.safetensors",
        )
    spliced = losses(models.load(source.model), ensemble_of(store, name, "real"), cell.hook_name, contexts, study.loss_tokens)
    save_file(vars(spliced), folder / "losses.safetensors")


def _text_inputs(source: Source) -> dict:
    """The source with what its paths hold now; the embedded corpus is what the installed packages hold."""
    packages = versions(corpus.EMBEDDED_PACKAGES) if source.corpus == corpus.EMBEDDED else fingerprint(source.corpus)
    return {"source": vars(source), "model": fingerprint(models.locate(source.model)), "corpus": packages}
