"""What an experiment is: what it computes for a cell, the tables and claims that follow from it, and what it reads.

A file of this folder that binds `EXPERIMENT` is one; `experiments()` finds it. Nothing else has to know of it: the plan of a study,
its tables and its ledger are made of the experiments there are.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import pandas as pd
from pydantic import BaseModel

from sae_stability.store import Store, Work
from sae_stability.study import Cell, Recipe, Study

EVERYWHERE = {*Recipe.model_fields, "seeds", "nulls", "surrogate_seeds", "name", "device", "threads", "stream", "at_once"}
"""Keys of a study that every experiment may read: the keys of ensembles hold what depends on them."""

IS_MAIN = "is_main"
"""What an experiment declares to read that asks more of the main cell."""

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Stage:
    """A part of a study that is computed at a time: under what names it stands, what it depends on, and what computes it."""

    name: str
    """What `sae-stability stage` calls it."""
    entries: dict[str, str]
    """The keys of what it computes, by the entries of the store: the seeds of an ensemble, the sites of a model; usually one."""
    compute: Callable[[Work], None]
    group: str
    """The folder that its entries share, with what outlives a kill."""
    after: tuple[str, ...] = ()
    """Names of the stages that it reads."""
    kind: str = ""
    """What costs alike: `text`, `activations`, `training`, or the name of an experiment."""
    cell: Cell | None = None
    """Whose sizes say what it costs; none where it only puts together what others computed."""


class Undeclared(AttributeError):
    """An experiment reads a key of the study that it does not declare, so that its results would outlive a change of it."""


class Declared:
    """A study or a cell of which only some keys can be read."""

    def __init__(self, model: BaseModel, keys: frozenset[str], is_main: bool = False):
        self._model, self._keys, self._is_main = model, keys, is_main

    def __getattr__(self, name: str) -> Any:
        if name in (*Study.model_fields, "id", "cells", "sha256", "main", "is_main") and name not in self._keys:
            raise Undeclared(f"{name} is not among what the experiment `reads`")
        return self._is_main if name == IS_MAIN else getattr(self._model, name)


@dataclass(frozen=True, eq=False)
class Results:
    """What was computed for one cell of a study: experiments read it, and chapters."""

    store: Store
    cell: Cell
    study: Study
    entries: Mapping[str, tuple[str, ...]]
    """Where in the store the cell's text, activations, ensembles and experiments stand, by their names."""

    @property
    def is_main(self) -> bool:
        """Whether it is the study's main cell, of which more is asked."""
        return bool(self.study.main.id == self.cell.id) if isinstance(self.study, Study) else self.study.is_main

    def folder(self, name: str) -> Path:
        """The folder of what has a single entry, such as an experiment."""
        (entry,) = self.entries[name]
        return self.store.path(entry)

    def folders(self, name: str) -> list[Path]:
        """The folders of what has several, such as an ensemble: one a seed."""
        return [self.store.path(entry) for entry in self.entries[name]]

    def reading(self, keys: frozenset[str]) -> "Results":
        """The same where no other keys of the study and the cell can be read."""
        declared = frozenset(keys) | EVERYWHERE
        cell, study = Declared(self.cell, declared), Declared(self.study, declared, self.is_main)
        return Results(self.store, cast(Cell, cell), cast(Study, study), self.entries)


@dataclass(frozen=True)
class Experiment:
    """One question to a cell. Its stage computes what is costly; its report makes tables and judges claims."""

    name: str
    compute: Callable[[Results, Path], None] | None
    """Fills a folder from the results of the cell; None where the report reads what others computed. What it puts into `SCRATCH`
    there outlives a kill and is no result."""
    after: tuple[str, ...] = ()
    """Experiments whose results `compute` reads."""
    reads: tuple[str, ...] = ()
    """Keys of the study and the cell, beyond those of the recipe and its seeds, that `compute` reads itself; or `IS_MAIN`."""
    content: Callable[[Study], object] | None = None
    """What files hold that such a key names: another content under the same name is another input."""
    tables: dict[str, Callable[[Results], pd.DataFrame]] = field(default_factory=dict)
    """The rows that a cell adds to each table of the study."""
    claims: Callable[[Results], list[dict]] | None = None
    """The lines that a cell adds to the ledger."""
    report_after: tuple[str, ...] = ()
    """Experiments that tables and claims read too."""
    report_reads: tuple[str, ...] = ()
    """Keys that tables and claims read themselves."""
    asked: Callable[[Study, Cell], bool] = lambda study, cell: True
    """Whether it is asked of a cell."""
    trains: str | None = None
    """The variant of SAEs that it trains itself, on data of its own: it asks nothing of the cell's, and all studies share it."""
    across: Callable[[Tables], Tables] | None = None
    """Adds what compares cells to the whole tables of a study."""


def is_main(study: Study, cell: Cell) -> bool:
    return cell.id == study.main.id


@cache
def experiments() -> dict[str, Experiment]:
    """All experiments by name, each behind those that it reads."""
    package = importlib.import_module(__package__)
    modules = (importlib.import_module(f"{__package__}.{found.name}") for found in pkgutil.iter_modules(package.__path__))
    waiting = {module.EXPERIMENT.name: module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")}
    ordered: dict[str, Experiment] = {}
    while waiting:
        ready = [each for each in waiting.values() if not {*each.after, *each.report_after} & set(waiting)]
        if not ready:
            raise ValueError(f"experiments read one another in a circle: {', '.join(waiting)}")
        for each in ready:
            ordered[each.name] = waiting.pop(each.name)
    return ordered
