"""Opens what the stages of a study have written: for the stages behind them, for tables and for chapters."""

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from sae_stability.ablation import Effects, Sets, sets_of
from sae_stability.config import Cell, Study
from sae_stability.evaluation import Fit, Losses
from sae_stability.language.activations import Activations
from sae_stability.language.corpus import Contexts
from sae_stability.matching import BANDS, CRITERIA, Families, Stability, stability
from sae_stability.saes.ensemble import Ensemble
from sae_stability.store import Store, read_json, read_metadata


def kinds_of(cell: Cell) -> list[str]:
    """The ensemble of a cell (`real`) and its nulls: the same training on other data."""
    return ["real", *cell.nulls]


@dataclass(frozen=True)
class Source:
    """A model on a corpus. The cells that share it share one tokenisation and one forward pass."""

    model: str
    corpus: str
    context: int | None
    hook_names: tuple[str, ...]
    tokens: int
    evaluation_tokens: int

    @property
    def folder(self) -> str:
        """Readable, and different for different sources: two models may both be called `final`."""
        digest = hashlib.sha256(f"{self.model}\0{self.corpus}\0{self.context}".encode()).hexdigest()[:8]
        return "-".join([Path(self.model).name, Path(self.corpus).name, digest])


def sources_of(study: Study) -> dict[str, Source]:
    """Each cell's source, by the cell's name; as large as the largest cell that shares it."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in study.cells.values():
        groups.setdefault((cell.model, cell.corpus, cell.context), []).append(cell)
    merged = {
        group: Source(
            *group,
            hook_names=tuple(sorted({cell.hook_name for cell in cells})),
            tokens=max(cell.tokens for cell in cells),
            evaluation_tokens=max(cell.evaluation_tokens for cell in cells),
        )
        for group, cells in groups.items()
    }
    return {name: merged[cell.model, cell.corpus, cell.context] for name, cell in study.cells.items()}


def contexts_of(store: Store, source: Source, split: str) -> Contexts:
    return Contexts(**load_file(store.folder / "text" / source.folder / f"{split}.safetensors"))


def facts_of(store: Store, source: Source) -> dict:
    """Sizes and hashes of the text and the model behind a cell."""
    return read_json(store.folder / "text" / source.folder / "facts.json")


def activations_of(store: Store, source: Source, cell: Cell, split: str, kind: str = "real") -> Activations:
    stage = "randomised" if kind == "randomised" else "activations"
    file = f"surrogate-{split}.bin" if kind == "surrogate" else f"{split}.bin"
    return Activations.open(store.folder / stage / source.folder / cell.hook_name / file)


def training_folder(store: Store, cell: str, kind: str) -> Path:
    """Where an ensemble was trained: a stage of its own, or one for all cells that read the same stream."""
    if store.study.stream:
        return store.folder / "streams" / sources_of(store.study)[cell].folder / cell / kind
    return store.folder / "cells" / cell / kind


def ensemble_of(store: Store, cell: str, kind: str) -> Ensemble:
    return Ensemble.open(training_folder(store, cell, kind) / "ensemble.safetensors")


def frontier_of(store: Store, cell: str) -> list[dict]:
    """L0 and explained variance of pilots that are sparser and denser than the cell; none where there is no other variant."""
    path = store.folder / "cells" / cell / "frontier" / "pilots.json"
    return read_json(path) if path.is_file() else []


def fit_of(store: Store, cell: str, kind: str) -> Fit:
    arrays = load_file(store.folder / "cells" / cell / "evaluation" / f"{kind}.safetensors")
    firings, rows = torch.from_numpy(arrays.pop("firings")), int(arrays.pop("rows"))
    return Fit(firings, rows, **arrays)


def losses_of(store: Store, cell: str) -> Losses:
    return Losses(**load_file(store.folder / "cells" / cell / "evaluation" / "losses.safetensors"))


@lru_cache(maxsize=8)
def matching_of(store: Store, cell: str, kind: str) -> dict[str, torch.Tensor]:
    """What the features of an ensemble were found to match, as the stage wrote it."""
    return load_tensors(store.folder / "cells" / cell / "matching" / f"{kind}.safetensors")


def stability_of(store: Store, cell: str, kind: str, criterion: str = "decoder") -> Stability:
    """The stability of the live features of an ensemble by one of `CRITERIA`, at the cell's threshold."""
    found = matching_of(store, cell, kind)
    tensors = (found[f"{criterion}/{name}"] for name in ("best_cosine", "partner", "runner_up"))
    return Stability(*tensors, found["alive"], store.study.cells[cell].threshold)


def criteria_of(store: Store, cell: str, kind: str) -> dict[str, Stability]:
    return {criterion: stability_of(store, cell, kind, criterion) for criterion in CRITERIA}


def families_of(store: Store, cell: str, kind: str) -> Families:
    found = matching_of(store, cell, kind)
    return Families(*(found[f"families/{field.name}"].numpy() for field in fields(Families)))


def ablation_folder(store: Store, cell: str) -> Path:
    """Where the stage has written what removals of features did."""
    return store.folder / "cells" / cell / "ablation"


@lru_cache(maxsize=4)
def effects_of(store: Store, cell: str, kind: str) -> tuple[Effects, Sets]:
    """The effects of removals, and the sets that were removed."""
    effects = Effects.of(load_tensors(ablation_folder(store, cell) / f"{kind}.safetensors"))
    return effects, sets_of(stability_of(store, cell, kind), effects.energy, effects.firings, effects.curves)


def triggers_of(store: Store, cell: str) -> pd.DataFrame:
    """One row per live feature of the ensemble: what it fires on, how often, and its band."""
    found, fires = stability_of(store, cell, "real"), fit_of(store, cell, "real")
    table = pd.read_parquet(store.folder / "cells" / cell / "triggers" / "triggers.parquet")
    table["band"] = np.array([*BANDS, "dead"])[found.band].ravel()
    table["stability"], table["frequency"] = found.probability.numpy().ravel(), fires.frequency.numpy().ravel()
    return table[found.alive.numpy().ravel()].reset_index(drop=True)


def explanations_of(store: Store) -> pd.DataFrame:
    """One row per engine and explained feature of the main cell, with its band: engines do not know it."""
    table = pd.read_parquet(store.folder / "cells" / "main" / "explanations" / "explanations.parquet")
    found, seeds = stability_of(store, "main", "real"), ensemble_of(store, "main", "real").seeds
    position = table["seed"].map({seed: place for place, seed in enumerate(seeds)}).to_numpy()
    return table.assign(band=np.array(BANDS)[found.band[position, table["feature"].to_numpy()]])


def growth_of(store: Store, cell: str, kind: str) -> dict[int, Stability]:
    """Stability on the way, by training tokens; features that are dead in the end are left out all along."""
    folder = training_folder(store, cell, kind) / "snapshots"
    end = stability_of(store, cell, kind)
    found = {}
    for file in folder.glob("*.safetensors"):
        found[read_metadata(file)["tokens"]] = stability(load_tensors(file)["W_dec"], end.threshold, end.alive)
    final = store.study.cells[cell].tokens * store.study.cells[cell].passes
    return dict(sorted(found.items())) | {final: end}
