"""What each stage of a study computes: a plain function that fills a folder from the results of the stages before it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from sae_stability import ablation, explanations, threads, training, triggers
from sae_stability.ablation.translation import TRANSPLANTS
from sae_stability.config import Cell, Study
from sae_stability.errors import UserError
from sae_stability.evaluation import Encoded, fit, losses, sparse_codes
from sae_stability.language import corpus, models
from sae_stability.language.activations import Activations, Blocks, collect, draw_surrogate
from sae_stability.language.interventions import Reading
from sae_stability.language.streaming import Stream
from sae_stability.matching import BANDS, by_every_criterion, families, nearest_within
from sae_stability.results import (
    Source,
    activations_of,
    contexts_of,
    ensemble_of,
    fit_of,
    kinds_of,
    stability_of,
)
from sae_stability.saes.ensemble import Ensemble
from sae_stability.store import Store, save_tensors, write_json, write_table

CODE_TOKENS = 100_000  # held-out tokens on which activations are correlated, and features removed
TRIGGER_TOKENS = 400_000  # held-out tokens on which it is asked what features fire on
EXPLAINED_SEEDS, EXPLAINED = 4, 15  # seeds of the main cell, and features of each band of each, that are explained
SAMPLED = 8  # features of each band, of the first seed, whose impact on prediction is measured one by one


def read_text(source: Source, folder: Path) -> None:
    """Check the model's hook points, then split, tokenise and pack the corpus.

    Raises `UserError` for a hook that the model lacks and for more tokens than the corpus has.
    """
    bridge = models.load(source.model)
    for hook_name in source.hook_names:
        models.check_hook(bridge, hook_name)
    context = models.context_length(bridge, source.context)
    wanted = source.tokens + source.evaluation_tokens
    text = corpus.load(source.corpus, characters=corpus.CHARACTERS_A_TOKEN * wanted)
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
    """Cache activations of every site of the source, and Gaussian surrogates of them; only held-out ones where training streams."""
    _collect(study, source, models.load(source.model), folder)
    for hook_name in source.hook_names:
        of_split = {split: folder / hook_name / f"{split}.bin" for split in _cached_splits(study, source)}
        real = Activations.open(of_split["evaluation" if study.stream else "train"])
        for split, path in of_split.items():
            rows, seed = len(Activations.open(path)), ("train", "evaluation").index(split)
            draw_surrogate(real, path.with_name(f"surrogate-{split}.bin"), rows, seed, f"surrogate, {split}")


def run_randomised(study: Study, source: Source, folder: Path) -> None:
    """The same on a copy of the model with shuffled weights."""
    _collect(study, source, models.load(source.model, randomised=True), folder)


def _collect(study: Study, source: Source, bridge, folder: Path) -> None:
    for split, tokens in _cached_splits(study, source).items():
        paths = {hook_name: folder / hook_name / f"{split}.bin" for hook_name in source.hook_names}
        contexts = contexts_of(Store(study), source, split)
        collect(bridge, contexts, paths, tokens, getattr(torch, study.dtype), f"activations, {split}")


def _cached_splits(study: Study, source: Source) -> dict[str, int]:
    """Tokens of the activations that are kept on disk."""
    cached = {"train": source.tokens, "evaluation": source.evaluation_tokens}
    return {"evaluation": cached["evaluation"]} if study.stream else cached


def train_cached(study: Study, source: Source, cell: Cell, kind: str, folder: Path) -> None:
    """Train the ensemble of a cell, or one of its nulls, on cached activations."""
    data = activations_of(Store(study), source, cell, "train", kind)
    ensemble = training.train(cell, data, cell.seeds_of(kind), folder, kind, study.device, study.at_once)
    _enough(cell, ensemble)


def train_streamed(study: Study, source: Source, cells: dict[str, Cell], folder: Path) -> None:
    """Train all cells of a source, and their nulls, together: one forward pass feeds them all."""
    jobs, streams = [], _Streams(study, source)
    for name, cell in cells.items():
        for kind in kinds_of(cell):
            jobs.append(training.prepare(cell, streams.blocks(cell, kind), cell.seeds_of(kind), folder / name / kind, study.device))
    for job, ensemble in zip(jobs, training.train_all(jobs, "training", torch.device(study.device), study.at_once), strict=True):
        _enough(job.cell, ensemble)


class _Streams:
    """The streams of a source: of the model, and of its copy with shuffled weights where a null asks for it."""

    def __init__(self, study: Study, source: Source):
        self.study, self.source, self.open = study, source, {}

    def blocks(self, cell: Cell, kind: str) -> Blocks:
        randomised = kind == "randomised"
        if randomised not in self.open:
            contexts = contexts_of(Store(self.study), self.source, "train")
            bridge = models.load(self.source.model, randomised)
            hook_names, dtype = list(self.source.hook_names), getattr(torch, self.study.dtype)
            self.open[randomised] = Stream(bridge, contexts, hook_names, self.source.tokens, dtype)
        stream = self.open[randomised]
        return stream.surrogate(cell.hook_name) if kind == "surrogate" else stream.site(cell.hook_name)


def _enough(cell: Cell, ensemble: Ensemble) -> None:
    if len(ensemble.seeds) < 2:
        raise UserError(f"rate: fewer than two seeds of {cell.label} did not diverge; lower rate")


def trace_frontier(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Train a sparser and a denser pilot, for the comparison of variants at equal explained variance."""
    store = Store(study)
    coefficient = ensemble_of(store, name, "real").coefficient
    data = _Streams(study, source).blocks(cell, "real") if study.stream else activations_of(store, source, cell, "train")
    pilots = training.sparser_and_denser(cell, data, coefficient, folder, torch.device(study.device))
    held_out = activations_of(store, source, cell, "evaluation")
    document = contexts_of(store, source, "evaluation")
    measured = [fit(pilot, held_out, document.document[document.is_text]) for pilot in pilots]
    write_json(
        folder / "pilots.json", [{"l0": of.l0[0].item(), "explained_variance": of.explained_variance(0).value} for of in measured]
    )


def evaluate(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Measure the ensemble and its nulls on held-out tokens, and the model's loss with the ensemble spliced in."""
    store = Store(study)
    contexts = contexts_of(store, source, "evaluation")
    document = contexts.document[contexts.is_text]
    for kind in kinds_of(cell):
        measured = fit(ensemble_of(store, name, kind), activations_of(store, source, cell, "evaluation", kind), document)
        save_file(
            {**vars(measured), "firings": measured.firings.numpy(), "rows": np.array(measured.rows)},
            folder / f"{kind}.safetensors",
        )
    site = Reading(models.load(source.model), cell.hook_name, contexts, study.loss_tokens)
    spliced = losses(site, ensemble_of(store, name, "real"))
    save_file(vars(spliced), folder / "losses.safetensors")


def match(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Find what reappears, by every criterion, in the ensemble and in its nulls."""
    store = Store(study)
    for kind in kinds_of(cell):
        ensemble, alive = ensemble_of(store, name, kind), fit_of(store, name, kind).firings > 0
        held_out = activations_of(store, source, cell, "evaluation", kind).first(CODE_TOKENS)
        W_dec, W_enc, codes = ensemble.W_dec, ensemble.W_enc, sparse_codes(ensemble, held_out)
        tensors = {"alive": alive}
        for criterion, found in by_every_criterion(W_dec, W_enc, codes, held_out.covariance, cell.threshold, alive).items():
            tensors |= {f"{criterion}/{part}": getattr(found, part).clone() for part in ("best_cosine", "partner", "runner_up")}
        grouped = families(W_dec, cell.threshold, alive)
        tensors |= {f"families/{part}": torch.from_numpy(array) for part, array in vars(grouped).items()}
        nearest = [nearest_within(directions, living) for directions, living in zip(W_dec, alive, strict=True)]
        save_tensors(folder / f"{kind}.safetensors", {**tensors, "nearest_within": torch.stack(nearest)}, {})


def find_triggers(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Ask of every feature of the ensemble what it fires on."""
    store, tokenizer = Store(study), models.load_tokenizer(source.model)
    held_out = activations_of(store, source, cell, "evaluation").first(TRIGGER_TOKENS)
    text = triggers.Text.of(contexts_of(store, source, "evaluation"), len(held_out))
    train = contexts_of(store, source, "train")
    seen = np.bincount(train.tokens[train.is_text], minlength=len(tokenizer))
    words = [tokenizer.decode([token]) for token in range(len(seen))]
    ensemble = ensemble_of(store, name, "real")

    def of_seed(position: int) -> pd.DataFrame:
        (codes,) = sparse_codes(ensemble.of(position), held_out)
        found = triggers.triggers(codes, text, words, seen / seen.sum())
        return found.assign(seed=ensemble.seeds[position], feature=np.arange(len(found)))

    parts = threads.each_seed(of_seed, len(ensemble.seeds), "triggers")
    write_table(folder / "triggers.parquet", pd.concat(parts, ignore_index=True))


def explanation_tasks(study: Study, source: Source) -> Iterator[tuple[int, list[explanations.Task]]]:
    """For some seeds of the main cell, what engines are given: features of every band, in an order that does not tell which."""
    store, tokenizer = Store(study), models.load_tokenizer(source.model)
    cell, contexts = study.cells["main"], contexts_of(store, source, "evaluation")
    held_out = activations_of(store, source, cell, "evaluation").first(TRIGGER_TOKENS)
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    ensemble, found = ensemble_of(store, "main", "real"), stability_of(store, "main", "real")
    for position, seed in enumerate(ensemble.seeds[:EXPLAINED_SEEDS]):
        rng = np.random.default_rng(seed)
        bands = [np.flatnonzero(found.band[position] == band) for band in range(len(BANDS))]
        chosen = np.concatenate([rng.permutation(of)[:EXPLAINED] for of in bands])
        (codes,) = sparse_codes(ensemble.of(position), held_out)
        yield seed, explanations.tasks(codes.tocsc(), rng.permutation(chosen), contexts, words)


def explain_features(study: Study, source: Source, folder: Path) -> None:
    """Explain some features of the main cell by rules, and by the study's language model where it has one.

    A budget that is spent ends the explanations of the language model, and keeps those that there are.
    """
    engines: list[explanations.Engine] = [explanations.Rules()]
    if study.explainer is not None:
        engines.append(explanations.LanguageModel(study.explainer, Store(study).folder / "answers"))
    rows = []
    for seed, given in explanation_tasks(study, source):
        for engine in engines:
            progress = tqdm(given, f"explanations by {engine.name}, seed {seed}", unit="feature", disable=None)
            try:
                rows += [{"seed": seed, "engine": engine.name, **found.row} for found in explanations.explain(engine, progress)]
            except explanations.BudgetSpent as reason:
                print(f"{study.name}: explainer.budget: {reason}; raise it to explain more features", flush=True)
                engines.remove(engine)
                break
    write_table(folder / "explanations.parquet", pd.DataFrame(rows))


def ablate(study: Study, source: Source, name: str, cell: Cell, folder: Path) -> None:
    """Remove the bands of the ensemble and of its surrogate, with their controls; on the main cell also ask how they translate.

    The surrogate's SAEs are judged on what they were trained on for reconstruction, and on the model's activations for prediction.
    """
    store, main = Store(study), name == "main"
    contexts = contexts_of(store, source, "evaluation")
    document = contexts.document[contexts.is_text]
    site = Reading(models.load(source.model), cell.hook_name, contexts, study.ablation_tokens)
    for kind in ("real", "surrogate"):
        ensemble, found = ensemble_of(store, name, kind), stability_of(store, name, kind)
        held_out = Encoded.of(ensemble, activations_of(store, source, cell, "evaluation", kind).first(CODE_TOKENS))
        detail = "bands" if kind == "surrogate" else "curves" if main else "controls"
        effects, sets = ablation.measure(held_out, found, document, site, tokens_alone=study.loss_tokens, detail=detail)
        save_tensors(folder / f"{kind}.safetensors", effects.tensors(), {})
        if main and kind == "real":
            sampled, first = ablation.sample(effects, sets, SAMPLED), ensemble.of(0)
            alone, true = (
                ablation.impact_on_prediction(site, first, {}),
                ablation.true_impact_on_prediction(site, first, sampled),
            )
            of_sample = {"first_order": alone.first_order[0, sampled[0]], "second_order": alone.second_order[0, sampled[0]]}
            save_tensors(folder / "sample.safetensors", {"feature": sampled[0], "true": true[0], **of_sample}, {})
            of_pair = torch.from_numpy(found.held_out_band)
            bands = {band: of_pair == BANDS.index(band) for band in ("stable", "unstable")}
            write_table(folder / "translation.parquet", ablation.translate_to_next(held_out, document, bands))
            for band, member in bands.items():
                moved = ablation.transplant(site, ensemble, member, effects.activation / effects.rows)
                by_seed = {what: np.stack([moved.nats[what, seed] for seed in range(len(ensemble.seeds))]) for what in TRANSPLANTS}
                save_file({"intact": moved.clean, "size": moved.tokens, **by_seed}, folder / f"transplant-{band}.safetensors")


SHARED = (_collect, _cached_splits, _Streams)
"""What several stages use of this module, and so part of every stage's key."""
