"""The tables and verdicts of a study, as pages read them: from its results, or as they are published in this repository."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from sae_stability import places
from sae_stability.experiments import Results, texts
from sae_stability.files import read_json
from sae_stability.loading import load_study, read_fields, read_study
from sae_stability.pipeline import Plan, compute
from sae_stability.store import git_commit
from sae_stability.study import Cell, Study, model_name, told_apart

VARIANTS = "variants"
"""The published study in which the main cell of `embedded` is trained by every variant."""
DRAWS = "draws"
"""The published study in which it is trained by eight times eleven seeds, and by the first of them on every null."""


class Tables(ABC):
    """What pages read of a study, wherever it stands."""

    study: Study
    origin = ""
    """Where the tables come from, in a sentence, if not from a study that was run here."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The folder of the tables, from the root of the repository."""

    @abstractmethod
    def _read(self, name: str) -> pd.DataFrame:
        """A table with the rows of all cells. Raises `FileNotFoundError` where there is none."""

    @property
    @abstractmethod
    def ledger(self) -> list[dict]:
        """Every line of every cell, as `placed` gives them."""

    @property
    def cell(self) -> Cell:
        """The main cell."""
        return self.study.main

    def table(self, name: str, every_cell: bool = False) -> pd.DataFrame:
        """The main cell's rows of a table, or those of every cell; empty where the study has no such table."""
        try:
            rows = self._read(name)
        except FileNotFoundError:
            return pd.DataFrame(columns=["cell", "cell_on_target"])
        rows.attrs["table"] = name  # which its rows keep, for whoever prints a number of one
        return rows if every_cell else rows[rows["cell"] == self.cell.id].reset_index(drop=True)

    @cached_property
    def row(self) -> pd.Series:
        """The main cell's row of `cells`."""
        return self.table("cells").iloc[0]

    @property
    def lines(self) -> list[dict]:
        """The main cell's lines of the ledger."""
        return [line for line in self.ledger if line["cell"] == self.cell.id]

    def claims(self, claim: str, cell: str | None = None) -> list[dict]:
        """The lines of a claim on a cell, by default the main one."""
        wanted = cell or self.cell.id
        return [line for line in self.ledger if line["id"] == claim and line["cell"] == wanted]

    def claim(self, claim: str, cell: str | None = None, line: str = "as stated") -> dict:
        """One of them, by default what the claim states."""
        return next(each for each in self.claims(claim, cell) if each["line"] == line)

    def others(self, name: str = "cells") -> pd.DataFrame:
        """The rows of the cells of the grid, with what tells each apart in the column `name`; its † says that it misses its L0."""
        rows = self.table(name, every_cell=True)
        return self.named(rows[rows["cell"] != self.cell.id])

    def named(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of some cells, with what tells these cells apart in the column `name`."""
        cells = {id: self.study.cells[id] for id in rows["cell"]}
        names = told_apart(cells.values()) if len(cells) > 1 else self.study.names
        on_target = rows.get("cell_on_target", pd.Series(True, rows.index))  # a study that was not asked how good its SAEs are
        signs = ["" if hit else " †" for hit in on_target]
        return rows.reset_index(drop=True).assign(name=[names[id] + sign for id, sign in zip(rows["cell"], signs, strict=True)])


@dataclass(frozen=True, eq=False)
class Book(Tables):
    """The results of a study, as chapters read them."""

    plan: Plan

    @property
    def study(self) -> Study:  # type: ignore[override]
        return self.plan.study

    @cached_property
    def main(self) -> Results:
        """What was computed for the main cell, for what no table holds."""
        return self.plan.results(self.cell)

    @property
    def model(self) -> str:
        """What readers call the main cell's language model."""
        return model_name(self.cell.model)

    @property
    def folder(self) -> Path:
        return self.plan.store.folder

    @property
    def place(self) -> str:
        return f"results/{self.study.name}/tables"

    def _read(self, name: str) -> pd.DataFrame:
        return self.plan.store.table(name)

    @cached_property
    def ledger(self) -> list[dict]:
        return placed(self.plan.store.claims(), f"results/{self.study.name}")

    @property
    def commits(self) -> tuple[str, str]:
        """The commit at which the ledger was computed, and the one at hand."""
        provenance = self.plan.store.provenance("claims.json") or {"commit": "unknown"}
        return short(provenance["commit"]), short(git_commit())

    @property
    def facts(self) -> dict:
        """Sizes and hashes of the text and the model behind the main cell."""
        return texts.facts(self.main)

    @property
    def compared(self) -> Tables:
        """Where the main cell is compared with others: this study, where it has any, or the published variants of the same cell."""
        elsewhere, number = published(VARIANTS), {"seeds", "surrogate_seeds", "nulls"}
        alike = elsewhere is not None and elsewhere.cell.model_dump(exclude=number) == self.cell.model_dump(exclude=number)
        return elsewhere if alike and elsewhere and len(self.study.cells) == 1 else self

    @property
    def beside_nulls(self) -> Tables:
        """Where a main cell is set beside further nulls: this study, where it has any but the surrogate, or the published draws."""
        return self if len(self.cell.nulls) > 1 else published(DRAWS) or self

    def stages(self) -> pd.DataFrame:
        """What each stage took: name, seconds (of its last part, where it was interrupted), peak_memory_gb, machine."""
        rows = []
        for stage in self.plan.stages:
            taken = [self.plan.store.provenance(entry) for entry in stage.entries]
            known = [each for each in taken if each is not None]
            if known:
                seconds, memory = sum(each["seconds"] for each in known), max(each["peak_memory_gb"] for each in known)
                rows.append({"name": stage.name, "seconds": seconds, "peak_memory_gb": memory, "machine": known[0]["machine"]})
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Published(Tables):
    """The tables of a study that takes long to compute, as they are published, and the provenance that came with them."""

    folder: Path

    @property
    def place(self) -> str:
        return f"published/{self.folder.name}"

    @cached_property
    def provenance(self) -> dict:
        return read_json(self.folder / "provenance.json")

    @cached_property
    def study(self) -> Study:  # type: ignore[override]
        return read_fields(self.provenance["study"])

    def _read(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.folder / f"{name}.parquet")

    @cached_property
    def ledger(self) -> list[dict]:
        return placed(read_json(self.folder / "claims.json"), self.place)

    @property
    def origin(self) -> str:  # type: ignore[override]
        machine = self.provenance["machine"] + (" and a GPU" if self.study.device == "cuda" else "")
        return (
            f"These tables are published with the book: they come from commit `{short(self.provenance['commit'])}`, on "
            f"{machine}, and `sae-stability run {self.study.name}` computes them again."
        )


def placed(lines: list[dict], folder: str) -> list[dict]:
    """Lines of a ledger, each with where it stands in the repository, and so each of its conditions (`stands`), for whoever prints
    a number of one."""
    for line in lines:
        row = {name: line[name] for name in ("cell", "id", "line")}
        line["stands"] = {"table": f"{folder}/claims.json", "row": row}
        for condition in line.get("conditions", []):
            condition["stands"] = {"table": f"{folder}/claims.json", "row": row | {"condition": condition["what"]}}
    return lines


def open_study(name: str) -> Book:
    """What a chapter calls first: the study's results, computed where they are missing."""
    path = places.results() / name / "study.json"
    book = Book(Plan(read_study(path) if path.is_file() else load_study(name)))
    if not all(book.plan.is_done(book.plan.stage(stage)) for stage in ("tables", "claims.json")):
        compute(book.study)
    return book


def published(name: str) -> Published | None:
    """A published study; None where this repository holds no such tables."""
    folder = places.published() / name
    return Published(folder) if (folder / "provenance.json").is_file() else None


def short(commit: str) -> str:
    """A commit as pages print it; what was changed since is not hidden."""
    return commit[:10] + ("+changes" if commit.endswith("+changes") else "")
