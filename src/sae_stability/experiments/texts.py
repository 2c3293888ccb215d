"""Text and activations: what a model reads, and what SAEs are trained and judged on. Studies share them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from sae_stability import sources
from sae_stability.errors import UserError
from sae_stability.experiments.experiment import Results, Stage
from sae_stability.files import fingerprint, read_json, save_arrays, write_json
from sae_stability.keys import key_of, versions
from sae_stability.language import corpus, documents, installed, models
from sae_stability.language.activations import Activations, collect, kept, longest_norms
from sae_stability.language.corpus import Contexts
from sae_stability.language.interventions import Reading
from sae_stability.language.tokens import check_ids
from sae_stability.saes import fastest_dtype
from sae_stability.store import SHARED, Store, Work
from sae_stability.study import Cell, Recipe, Study, digest

SPLITS = ("train", "evaluation")
HELD_OUT_CLUSTERS = 4
"""Of near-duplicate documents, from which intervals over text are given."""
HELD_OUT_TOKENS = 512
MOST_UNKNOWN = 0.5
"""Of the tokens of a text, that its model may not know."""


def text_entry(cell: Cell) -> tuple[str, str]:
    """Where the text of a cell stands, and its key: a model's tokens of a corpus.

    Raises `UserError` for a corpus that is not there.
    """
    ours = cell.corpus in corpus.INSTALLED
    content = versions(installed.packages(cell.corpus)) if ours else _content(cell.corpus)
    inputs = {"model": fingerprint(models.locate(cell.model)), "corpus": content, "context": cell.context}
    if corpus.is_bounded(cell.corpus):
        inputs["characters"] = _characters(cell)
    key = key_of(inputs, [read_text])
    return f"{SHARED}/texts/{_slug(cell.model, cell.corpus)}-{key[:12]}", key


def _characters(cell: Cell) -> int:
    """Of a dataset no more is read than is needed."""
    return corpus.characters(cell.tokens, cell.evaluation_tokens)


def data_key(study: Study, cell: Cell, kind: str) -> str:
    """The key of what an ensemble is trained on, the activations of a site or a null source, whatever else of it is cached."""
    inputs = cell.model_dump(include={"hook_name", "dtype", "norm_cutoff"})
    inputs |= {"model_dtype": str(model_dtype(study, cell)), "device": study.device, "threads": study.threads}
    source = sources.source(kind)
    if source.drawn:
        inputs["tokens"] = cell.tokens  # that it is fitted to
    return key_of({"kind": kind, **inputs}, [source, run_model, draw_null], [text_entry(cell)[1]])


def activations_entry(study: Study, cell: Cell, kind: str) -> tuple[str, str]:
    """Where the activations of a cell stand, or those of one of its nulls, and their key."""
    tokens = _cached_tokens(study, cell)
    if sources.source(kind).drawn:
        tokens = {"train": cell.tokens, "evaluation": tokens["evaluation"]}
    key = key_of({"tokens": tokens, "stream": study.stream}, [], [data_key(study, cell, kind)])
    return f"{SHARED}/activations/{_slug(cell.model, cell.corpus)}-{cell.hook_name}-{kind}-{key[:12]}", key


def stages(study: Study) -> Iterable[Stage]:
    """The texts of a study, the activations of its models, and the null sources that are drawn from them."""
    for group in _grouped(study, _text):
        entry, key = text_entry(group[0])
        hooks = sorted({cell.hook_name for cell in group})
        widest = _widest(group)
        yield Stage(entry, {entry: key}, partial(read_text, widest, hooks), entry, kind="text", cell=widest)
    for kind in _kinds(study, drawn=False):
        cells = [cell for cell in study.cells.values() if kind in cell.kinds]
        for group in _grouped(study, partial(_pass, study), cells):
            entries = dict(activations_entry(study, cell, kind) for cell in group)
            cells_of = {activations_entry(study, cell, kind)[0]: cell for cell in group}
            name, text = pass_name(study, group[0], kind), text_entry(group[0])[0]
            compute = partial(run_model, study, kind, cells_of)
            yield Stage(name, entries, compute, f"{SHARED}/{name}", (text,), "activations", _widest(group))
    for kind in _kinds(study, drawn=True):
        done = set()
        for cell in study.cells.values():
            entry, key = activations_entry(study, cell, kind) if kind in cell.kinds else ("", "")
            if entry and entry not in done:
                done.add(entry)
                behind = (pass_name(study, cell, "real"),)
                yield Stage(entry, {entry: key}, partial(draw_null, study, kind, cell), entry, behind, "null source", cell)


def pass_name(study: Study, cell: Cell, kind: str) -> str:
    """The name of the stage that computes the activations of a cell, or of one of its nulls, in one pass with those of others."""
    text = text_entry(cell)[0].rpartition("/")[2]
    return f"activations/{kind}/{text}-{digest(_pass(study, cell))[:6]}"


def read_text(cell: Cell, hook_names: list[str], work: Work) -> None:
    """Check the model's hook points, then split, tokenise and pack the corpus.

    Raises `UserError` for a hook that the model lacks and for text that fills no context.
    """
    bridge = models.load(cell.model)
    for hook_name in hook_names:
        models.check_hook(bridge, hook_name)
    context = models.context_length(bridge, cell.context)
    text = corpus.load(cell.corpus, characters=_characters(cell))
    print(f"corpus: {text.told}")
    tokenizer = models.load_tokenizer(cell.model)  # as it was saved: that of the bridge has what it lacked
    packed = {
        "train": corpus.pack(text.train, tokenizer, context),
        "evaluation": corpus.pack(text.evaluation, tokenizer, context, text.clusters),
    }
    check_ids(bridge, *(contexts.tokens for contexts in packed.values()))
    if not packed["evaluation"].is_text.any():
        raise UserError(
            f"corpus: the held-out documents of {cell.corpus} ({text.told}) fill no context of {context} tokens; give more text"
        )
    unknown = np.mean(packed["evaluation"].tokens[packed["evaluation"].is_text] == tokenizer.unk_token_id)
    if unknown > MOST_UNKNOWN:
        raise UserError(
            f"corpus: {unknown:.0%} of the tokens of {cell.corpus} are words that the model's tokenizer does not know; give a text "
            "of its language, or another model"
        )
    for split, contexts in packed.items():
        arrays = {"tokens": contexts.tokens, "cluster": contexts.cluster, "is_text": contexts.is_text}
        save_arrays(work.folder / f"{split}.safetensors", arrays)
    train, held_out = (packed[split].sequence() for split in SPLITS)
    moved = packed["train"].cluster[:, 1:].ravel() < text.moved
    facts = {
        "corpus": cell.corpus,
        "corpus_sha256": text.sha256,
        "train_documents": len(text.train),
        "evaluation_documents": len(text.evaluation),
        "evaluation_clusters": len(set(text.clusters)),
        "tokens_of_few_clusters": tokens_of_clusters(packed["evaluation"], HELD_OUT_CLUSTERS),
        "repeated_documents": text.repeated,
        "leak": corpus.leak(train, held_out),
        "leak_by_document": corpus.leak(train[~moved], np.concatenate([train[moved], held_out])),
        "train_tokens": int(packed["train"].is_text.sum()),
        "evaluation_tokens": int(packed["evaluation"].is_text.sum()),
        "context": context,
        "layers": bridge.cfg.n_layers,
        "d_model": bridge.cfg.d_model,
        "vocabulary": bridge.cfg.d_vocab,
    }
    write_json(work.folder / "facts.json", facts)


def tokens_of_clusters(held_out: Contexts, count: int) -> int:
    """How many held-out tokens it takes, from the first on, to read of so many clusters."""
    begins = np.sort(np.unique(held_out.cluster[held_out.is_text], return_index=True)[1])
    return int(begins[min(count, len(begins)) - 1]) + 1


def run_model(study: Study, kind: str, cells: dict[str, Cell], work: Work) -> None:
    """Cache the activations of some sites of a model in one pass; where training streams, those of held-out text only."""
    first = next(iter(cells.values()))
    text = Store(study).path(text_entry(first)[0])
    check_tokens(study, first, read_json(text / "facts.json"))
    contexts = {split: Contexts(**load_file(text / f"{split}.safetensors")) for split in SPLITS}
    bridge = load_model(study, first, sources.source(kind).shuffled_weights)
    folders = {cells[entry].hook_name: folder for entry, folder in work.folders.items()}
    longest = None
    if first.norm_cutoff is not None:
        longest = longest_norms(bridge, contexts["train"], list(folders), first.norm_cutoff)
    for split, tokens in _cached_tokens(study, first).items():
        paths = {hook: folder / f"{split}.bin" for hook, folder in folders.items()}
        described = f"activations, {split}" if kind == "real" else f"{kind}, {split}"
        collect(bridge, contexts[split], paths, tokens, getattr(torch, first.dtype), described, longest)


def draw_null(study: Study, kind: str, cell: Cell, work: Work) -> None:
    """Cache a null source that is drawn from the activations of a site."""
    store = Store(study)
    folder, text = store.path(activations_entry(study, cell, "real")[0]), store.path(text_entry(cell)[0])
    real = {split: Activations.open(folder / f"{split}.bin") for split in _cached_tokens(study, cell)}
    ids = {split: _ids(text, folder, split, len(of)) for split, of in real.items()}
    fitted = "evaluation" if study.stream else "train"
    if not study.stream:
        real["train"] = real["train"].normalised_by_first(cell.tokens)
    draw = sources.source(kind).fit(real[fitted], ids[fitted])
    for split, of in real.items():
        path = work.folder / f"{split}.bin"
        sources.write_drawn(draw, of, ids[split], path, SPLITS.index(split), f"{kind}, {split}")


def check_tokens(study: Study, cell: Cell, facts: dict) -> None:
    """Raises `UserError` where a cell of a text wants more tokens than the text has, or where the held-out text could not carry
    intervals: before anything is trained."""
    wanted = max(other.tokens for other in study.cells.values() if _text(other) == _text(cell))
    if facts["train_tokens"] < wanted:
        repeated = facts["repeated_documents"]
        why = f" ({repeated:,} documents that repeat others are left out)" if repeated else ""
        raise UserError(
            f"tokens: {cell.corpus} has {facts['train_tokens']:,} training tokens, not {wanted:,}{why}; set tokens to "
            "as many or fewer, and passes to read them several times"
        )
    if facts["evaluation_clusters"] < HELD_OUT_CLUSTERS:
        needed = round(HELD_OUT_CLUSTERS / corpus.EVALUATION_SHARE)
        raise UserError(
            f"corpus: {cell.corpus} has {facts['evaluation_clusters']} held-out document(s) that differ, and intervals over text "
            f"need {HELD_OUT_CLUSTERS}; give about {needed} documents that are no near-duplicates, or split long ones by blank "
            "lines"
        )
    if cell.evaluation_tokens < facts["tokens_of_few_clusters"]:
        raise UserError(
            f"evaluation_tokens: the first {cell.evaluation_tokens:,} held-out tokens are of fewer than {HELD_OUT_CLUSTERS} "
            f"documents that differ, and intervals over text need as many; give {facts['tokens_of_few_clusters']:,} or more, or "
            "split long documents by blank lines"
        )
    if min(facts["evaluation_tokens"], cell.evaluation_tokens) < HELD_OUT_TOKENS:
        what = "evaluation_tokens" if cell.evaluation_tokens < HELD_OUT_TOKENS else "corpus"
        held = min(facts["evaluation_tokens"], cell.evaluation_tokens)
        raise UserError(f"{what}: {held:,} held-out tokens can't carry intervals; give {HELD_OUT_TOKENS:,} or more")


def contexts(results: Results, split: str, kind: str = "real") -> Contexts:
    """The packed text of a cell; tokens whose activations the recipe leaves out are no text."""
    packed = Contexts(**load_file(results.folder("text") / f"{split}.safetensors"))
    if results.cell.norm_cutoff is None:
        return packed
    read = "real" if sources.source(kind).drawn else kind
    return kept(results.folder(f"activations/{read}") / f"{split}.bin", packed)


def reading(results: Results, tokens: int) -> Reading:
    """The model at the cell's site, about to read so many held-out tokens: on the study's device, in `model_dtype`."""
    bridge = load_model(results.store.study, results.cell)
    return Reading(bridge, results.cell.hook_name, contexts(results, "evaluation"), tokens)


def load_model(study: Study, cell: Cell, shuffled_weights: bool = False):
    """The language model of a cell, where and in which dtype the study computes."""
    return models.load(cell.model, shuffled_weights, study.device, model_dtype(study, cell))


def model_dtype(study: Study, recipe: Recipe) -> torch.dtype:
    """In which dtype the language model computes on the device of a study."""
    fastest = recipe.model_dtype == "fastest"
    return fastest_dtype(torch.device(study.device)) if fastest else getattr(torch, recipe.model_dtype)


def facts(results: Results) -> dict:
    """Sizes and hashes of the text and the model behind a cell."""
    return read_json(results.folder("text") / "facts.json")


def activations(results: Results, split: str, kind: str = "real") -> Activations:
    """The activations of a cell, or of one of its nulls: as many as it asks for, under the normalisation of these alone."""
    cached = Activations.open(results.folder(f"activations/{kind}") / f"{split}.bin")
    wanted = results.cell.tokens if split == "train" else results.cell.evaluation_tokens
    return cached.normalised_by_first(min(wanted, len(cached)))


def _content(name: str) -> str | dict:
    """What a corpus holds now, file by file of those that are read; the name of a dataset stands for itself.

    Raises `UserError` for a path at which there is nothing: results of another text would else count as of this one.
    """
    named = corpus.named(name)
    if documents.is_dataset(named):
        content = fingerprint(str(named.path)) if named.path.exists() else named.place
        return content if named.place == name else {"named": name, "content": content}
    if named.path.is_file():
        return {"column": named.column, "file": fingerprint(str(named.path))}
    found = documents.files(named.path)
    return {"column": named.column, "files": {str(file.relative_to(named.path)): fingerprint(str(file)) for file in found}}


def _ids(text: Path, folder: Path, split: str, rows: int) -> torch.Tensor:
    """The tokens whose activations a file holds."""
    packed = kept(folder / f"{split}.bin", Contexts(**load_file(text / f"{split}.safetensors")))
    return torch.from_numpy(packed.tokens[packed.is_text][:rows].astype(np.int64))


def _cached_tokens(study: Study, cell: Cell) -> dict[str, int]:
    """How many tokens of the cell's text are kept as activations: as many as any cell that shares the pass wants."""
    group = [other for other in study.cells.values() if _pass(study, other) == _pass(study, cell)]
    tokens = {"train": max(other.tokens for other in group), "evaluation": max(other.evaluation_tokens for other in group)}
    return {"evaluation": tokens["evaluation"]} if study.stream else tokens


def _text(cell: Cell) -> tuple:
    """What cells have in common that read one text."""
    return (cell.model, cell.corpus, cell.context, _characters(cell) if corpus.is_bounded(cell.corpus) else None)


def _pass(study: Study, cell: Cell) -> tuple:
    """What cells have in common that one pass of the model can serve."""
    return (*_text(cell), cell.dtype, str(model_dtype(study, cell)), cell.norm_cutoff)


def _kinds(study: Study, drawn: bool) -> list[str]:
    """The kinds of sources that a study asks for."""
    kinds = dict.fromkeys(kind for cell in study.cells.values() for kind in cell.kinds)
    return [kind for kind in kinds if sources.source(kind).drawn == drawn]


def _grouped(study: Study, by, cells: Iterable[Cell] | None = None) -> list[list[Cell]]:
    groups: dict[object, list[Cell]] = {}
    for cell in study.cells.values() if cells is None else cells:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


def _widest(group: list[Cell]) -> Cell:
    """The cell that reads most of a text."""
    return max(group, key=lambda cell: cell.tokens + cell.evaluation_tokens)


def _slug(*names: str) -> str:
    """The last parts of names, for a reader of the folder; what tells entries apart is the key behind it."""
    plain = ("".join(c if c.isalnum() or c in "._-" else "_" for c in Path(name).name) for name in names)
    return "-".join(name.encode()[:40].decode(errors="ignore") for name in plain)  # file systems count bytes
