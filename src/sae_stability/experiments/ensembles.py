"""Trained SAEs: one entry a seed of a recipe, found by what it depends on from every cell and study that asks for it.

Seeds that are missing are trained together. A seed trained alone and the same seed trained in company give the same bits, so that
twelve seeds of one study serve another one of twenty-four.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from sae_stability import sources, training
from sae_stability.errors import UserError
from sae_stability.experiments import texts
from sae_stability.experiments.experiment import Results, Stage
from sae_stability.files import read_json, read_metadata, save_tensors, write_json
from sae_stability.keys import key_of
from sae_stability.language.activations import Activations, Blocks
from sae_stability.language.corpus import Contexts
from sae_stability.language.streaming import Stream
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.store import SHARED, Store, Work
from sae_stability.study import Cell, Recipe, Study
from sae_stability.training import CURVE, DIVERGED, ENSEMBLE, SNAPSHOTS

TRAINING = "training"


def entries(study: Study, cell: Cell, kind: str) -> dict[str, str]:
    """The entries of the seeds of an ensemble, or of one of its nulls, with their key: it is that of the recipe, on its source."""
    recipe = cell.recipe
    encoder = str(training.encoder_dtype(recipe, torch.device(study.device)))
    inputs = {**recipe.model_dump(), "encoder": encoder, "device": study.device, "stream": study.stream}
    before = {"model", "corpus", "context", "model_dtype"}  # the key before it holds what they are
    inputs = {name: value for name, value in inputs.items() if name not in before}
    roots = [train_streamed if study.stream else train_cached, variant(recipe.variant)]
    key = key_of(inputs, roots, [texts.data_key(study, cell, kind)])
    name = f"{SHARED}/ensembles/{recipe.variant}-{recipe.d_sae}-{kind}-{key[:12]}"
    return {f"{name}/{seed}": key for seed in cell.seeds_of(kind)}


def stages(study: Study) -> Iterable[Stage]:
    """The ensembles of a study, each recipe once: on cached activations, or all that read one stream together."""
    wanted: dict[str, tuple[Cell, str, dict[str, str]]] = {}
    for cell in study.cells.values():
        for kind in cell.kinds:
            of_seeds = entries(study, cell, kind)
            group = next(iter(of_seeds)).rpartition("/")[0]
            if group in wanted:
                of_seeds = wanted[group][2] | of_seeds
            wanted[group] = (cell, kind, of_seeds)
    if not study.stream:
        for group, (cell, kind, of_seeds) in wanted.items():
            data = texts.activations_entry(study, cell, kind)[0]
            behind = data if sources.source(kind).drawn else texts.pass_name(study, cell, kind)
            yield Stage(group, of_seeds, partial(train_cached, study, cell, kind), group, (behind,), TRAINING, cell)
        return
    streams: dict[str, dict[str, tuple[Cell, str, dict[str, str]]]] = {}
    for group, (cell, kind, of_seeds) in wanted.items():
        streams.setdefault(texts.text_entry(cell)[0], {})[group] = (cell, kind, of_seeds)
    for text, ensembles in streams.items():
        every = {entry: key for _, _, of_seeds in ensembles.values() for entry, key in of_seeds.items()}
        name = f"{SHARED}/streams/{text.rpartition('/')[2]}"
        yield Stage(name, every, partial(train_streamed, study, ensembles), name, (text,), TRAINING, study.main)


def train_cached(study: Study, cell: Cell, kind: str, work: Work) -> None:
    """Train the missing seeds of a recipe on cached activations."""
    store, recipe = Store(study), cell.recipe
    data = Activations.open(store.path(texts.activations_entry(study, cell, kind)[0]) / "train.bin")
    if len(data) < recipe.tokens:
        raise UserError(f"tokens: {recipe.tokens:,} wanted and {len(data):,} there; lower tokens (and raise passes)")
    data = data.normalised_by_first(recipe.tokens)
    seeds = [int(folder.name) for folder in work.folders.values()]
    ensemble = training.train(_steered(recipe, work), data, seeds, work.scratch, kind, study.device, study.at_once)
    _give_to_seeds(ensemble, work)


def train_streamed(study: Study, ensembles: dict[str, tuple[Cell, str, dict[str, str]]], work: Work) -> None:
    """Train the missing seeds of all recipes that read one stream: one forward pass feeds them all."""
    streams = _Streams(study)
    jobs: list[tuple[training.Job, Work]] = []
    for group, (cell, kind, of_seeds) in ensembles.items():
        missing = {entry: work.folders[entry] for entry in of_seeds if entry in work.folders}
        if missing:
            part = Work(missing, work.scratch / group.rpartition("/")[2])
            seeds = [int(path.name) for path in missing.values()]
            recipe = _steered(cell.recipe, part)
            jobs.append((training.prepare(recipe, streams.blocks(cell, kind), seeds, part.scratch, study.device), part))
    trained = training.train_all([job for job, _ in jobs], "training", torch.device(study.device), study.at_once)
    for ensemble, (_, part) in zip(trained, jobs, strict=True):
        _give_to_seeds(ensemble, part)


def _steered(recipe: Recipe, work: Work) -> Recipe:
    """The recipe with the coefficient that pilots have found for other seeds of it, where there are any."""
    missing = {folder.name for folder in work.folders.values()}
    for sibling in sorted(next(iter(work.folders.values())).parent.glob(f"*/{ENSEMBLE}")):
        if sibling.parent.name not in missing and variant(recipe.variant).steered:
            return recipe.model_copy(update={"coefficient": Ensemble.open(sibling).coefficient})
    return recipe


def _give_to_seeds(ensemble: Ensemble, work: Work) -> None:
    """Give every seed of an ensemble that was trained in `scratch` its own files, and those that diverged a note of it."""
    folder = work.scratch
    curve = pd.DataFrame(read_json(folder / CURVE))
    diverged = {int(seed): step for seed, step in read_json(folder / DIVERGED).items()}
    for target in work.folders.values():
        seed = int(target.name)
        write_json(target / CURVE, curve[curve["seed"] == seed].to_dict("records"))
        if seed in diverged:
            write_json(target / DIVERGED, diverged[seed])
            continue
        position = ensemble.seeds.index(seed)
        for snapshot in sorted((folder / SNAPSHOTS).glob("*.safetensors")):
            alone = {"W_dec": load_file(snapshot)["W_dec"][position : position + 1]}
            save_tensors(target / SNAPSHOTS / snapshot.name, alone, read_metadata(snapshot) | {"seeds": [seed]})
        ensemble.of(position).save(target / ENSEMBLE)


class _Streams:
    """The streams of a study: of its models, and of their copies with shuffled weights where a null asks for it."""

    def __init__(self, study: Study):
        self.study = study
        self.open: dict[tuple, Stream] = {}

    def blocks(self, cell: Cell, kind: str) -> Blocks:
        """What a cell, or one of its nulls, is trained on."""
        source = sources.source(kind)
        text, _ = texts.text_entry(cell)
        shared = (text, source.shuffled_weights, texts.model_dtype(self.study, cell), cell.dtype)
        if shared not in self.open:
            packed = Contexts(**texts.load_file(Store(self.study).path(text) / "train.safetensors"))
            cells = [other for other in self.study.cells.values() if texts.text_entry(other)[0] == text]
            bridge = texts.load_model(self.study, cell, source.shuffled_weights)
            hooks, tokens = sorted({other.hook_name for other in cells}), max(other.tokens for other in cells)
            self.open[shared] = Stream(bridge, packed, hooks, tokens, getattr(torch, cell.dtype))
        stream = self.open[shared]
        return stream.drawn(cell.hook_name, source.fit, cell.tokens) if source.drawn else stream.site(cell.hook_name, cell.tokens)


def blocks(results: Results) -> Blocks:
    """What the ensemble of a cell was trained on."""
    if results.study.stream:
        return _Streams(results.store.study).blocks(results.cell, "real")
    return texts.activations(results, "train")


def ensemble(results: Results, kind: str = "real") -> Ensemble:
    """The ensemble of a cell, or of one of its nulls, without the seeds that diverged.

    Raises `UserError` where fewer than two did not: stability compares seeds.
    """
    parts = [Ensemble.open(folder / ENSEMBLE) for folder in results.folders(f"ensembles/{kind}") if (folder / ENSEMBLE).exists()]
    if len(parts) < 2:
        raise UserError(f"rate: fewer than two seeds of {results.cell.label} did not diverge; lower rate")
    return Ensemble.joined(parts)


def curve(results: Results, kind: str) -> pd.DataFrame:
    """The training curve: one row per seed and point."""
    rows = [row for folder in results.folders(f"ensembles/{kind}") for row in read_json(folder / CURVE)]
    return pd.DataFrame(rows).sort_values("tokens", kind="stable", ignore_index=True)


def snapshots(results: Results, kind: str) -> dict[int, torch.Tensor]:
    """The decoders [seed, d_sae, d_in] on the way, by the tokens that each seed had seen."""
    files: dict[int, list[Path]] = {}
    for folder in results.folders(f"ensembles/{kind}"):
        for file in sorted((folder / SNAPSHOTS).glob("*.safetensors")):
            files.setdefault(read_metadata(file)["tokens"], []).append(file)
    return {tokens: torch.cat([load_file(file)["W_dec"] for file in of_seeds]) for tokens, of_seeds in sorted(files.items())}


def seconds(results: Results, kind: str = "real") -> float:
    """What training took, pilots of a penalty included."""
    provenances = (results.store.provenance(entry) for entry in results.entries[f"ensembles/{kind}"])
    return sum(provenance["seconds"] for provenance in provenances if provenance)
