"""The plan of a study: its stages in the order in which they run, each of which can run alone.

First texts, activations and ensembles, which studies share; then, for each cell, what each experiment computes and what it reports;
then the tables and the ledger of the study, put together from the reports.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from sae_stability import ledger, pooling, sources
from sae_stability.errors import UserError
from sae_stability.experiments import Experiment, Results, Stage, ensembles, experiments, explanations, generality, pools, texts
from sae_stability.experiments.experiment import IS_MAIN
from sae_stability.files import read_json, write_json, write_table
from sae_stability.keys import key_of
from sae_stability.language import models
from sae_stability.language.activations import Activations
from sae_stability.saes import variant
from sae_stability.saes.sae import SAE
from sae_stability.store import SHARED, Store, Work
from sae_stability.study import Cell, Recipe, Study, nearest


@dataclass(frozen=True, eq=False)
class Plan:
    """What there is to compute of a study, and where it stands."""

    study: Study

    @cached_property
    def store(self) -> Store:
        return Store(self.study)

    @cached_property
    def stages(self) -> list[Stage]:
        """In the order in which they run: what a user can get wrong is checked by the first ones."""
        shared = [*texts.stages(self.study), *ensembles.stages(self.study)]
        makers = {entry: stage.name for stage in shared for entry in stage.entries}
        asked = [stage for cell in self.study.cells.values() for stage in self._cell_stages(cell, makers)]
        return [*shared, *asked, *self._whole_stages]

    def results(self, cell: Cell) -> Results:
        """What is computed for a cell, for whoever reads it."""
        return Results(self.store, cell, self.study, self._entries[cell.id])

    @cached_property
    def _entries(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Of each cell, where what its experiments read and write stands."""
        entries: dict[str, dict[str, tuple[str, ...]]] = {}
        for cell in self.study.cells.values():
            found: dict[str, tuple[str, ...]] = {"text": (texts.text_entry(cell)[0],)}
            for kind in cell.kinds:
                found[f"activations/{kind}"] = (texts.activations_entry(self.study, cell, kind)[0],)
                found[f"ensembles/{kind}"] = tuple(ensembles.entries(self.study, cell, kind))
            for experiment in self._asked(cell):
                for part in ("", "report/"):
                    found[f"{part}{experiment.name}"] = (self._entry(cell, experiment, part),)
            entries[cell.id] = found
        return entries

    def _asked(self, cell: Cell) -> list[Experiment]:
        wanted = self._wanted
        return [each for each in experiments().values() if each.name in wanted and each.asked(self.study, cell)]

    @cached_property
    def _wanted(self) -> set[str]:
        """The names of the experiments that the study asks for, and of those that they read.

        Raises `UserError` for a name that no experiment has.
        """
        known = experiments()
        waiting, wanted = list(self.study.experiments or known), set()
        while waiting:
            name = waiting.pop()
            if name not in known:
                raise UserError(f"experiments: there is no {name}{nearest(name, known)}; there are {', '.join(known)}")
            if name not in wanted:
                wanted.add(name)
                waiting += [*known[name].after, *known[name].report_after]
        return wanted

    @cached_property
    def _keys(self) -> dict[tuple[str, str], str]:
        """The keys of what experiments compute (by cell and name) and report (`report/NAME`)."""
        keys: dict[tuple[str, str], str] = {}
        for cell in self.study.cells.values():
            ensembles_before = [next(iter(ensembles.entries(self.study, cell, kind).values())) for kind in cell.kinds]
            seeds = {kind: cell.seeds_of(kind) for kind in cell.kinds}
            roots = [variant(cell.variant), *(sources.source(kind) for kind in cell.kinds)]
            for experiment in self._asked(cell):
                before = [keys[cell.id, name] for name in experiment.after]
                inputs = self._inputs(cell, experiment.reads)
                if experiment.content is not None:
                    inputs["content"] = experiment.content(self.study)
                compute: list[Any] = [experiment.compute] if experiment.compute else []
                if experiment.trains is None:
                    inputs, before = {"seeds": seeds, **inputs}, [*ensembles_before, *before]
                    compute += roots
                else:  # what it does not set itself of what is trained, the schema does
                    inputs = {"defaults": {name: str(field.default) for name, field in Recipe.model_fields.items()}, **inputs}
                    compute.append(variant(experiment.trains))
                keys[cell.id, experiment.name] = key_of(inputs, compute, before)
                before = [keys[cell.id, name] for name in (experiment.name, *experiment.report_after)]
                inputs = self._inputs(cell, experiment.report_reads)
                reported = [*experiment.tables.values(), *([experiment.claims] if experiment.claims else [])]
                keys[cell.id, f"report/{experiment.name}"] = key_of(inputs, [report, *reported], before)
        return keys

    def _inputs(self, cell: Cell, reads: Iterable[str]) -> dict:
        values = {**self.study.model_dump(mode="json"), **cell.model_dump(mode="json"), IS_MAIN: cell.id == self.study.main.id}
        return {key: values[key] for key in reads}

    def _entry(self, cell: Cell, experiment: Experiment, part: str) -> str:
        key = self._keys[cell.id, f"{part}{experiment.name}"]
        trained = f"{cell.variant}-{cell.d_sae}" if experiment.trains is None else experiment.trains
        return f"{SHARED}/{part}{experiment.name}/{trained}-{key[:12]}"

    def _readable(self, experiment: Experiment, reports: bool) -> frozenset[str]:
        """The keys of the study that an experiment may read: those that it declares, and those of the experiments behind it."""
        behind = (*experiment.after, *(experiment.report_after if reports else ()))
        own = (*experiment.reads, *(experiment.report_reads if reports else ()))
        return frozenset(own).union(*(self._readable(experiments()[name], reports) for name in behind))

    def _cell_stages(self, cell: Cell, makers: dict[str, str]) -> Iterator[Stage]:
        """`makers` are the stages that make what studies share, by the entry."""
        results = self.results(cell)
        shared = (entry for entries in self._entries[cell.id].values() for entry in entries if entry in makers)
        behind = tuple(dict.fromkeys(makers[entry] for entry in shared))
        for experiment in self._asked(cell):
            name = f"{cell.id}/{experiment.name}"
            before = (*(() if experiment.trains else behind), *(f"{cell.id}/{other}" for other in experiment.after))
            if experiment.compute is not None:
                reading = results.reading(self._readable(experiment, reports=False))
                entry, key = self._entry(cell, experiment, ""), self._keys[cell.id, experiment.name]
                compute = partial(_compute, experiment.compute, reading)
                yield Stage(name, {entry: key}, compute, entry, before, experiment.name, cell)
                before = (name,)
            if experiment.tables or experiment.claims:
                reading = results.reading(self._readable(experiment, reports=True))
                entry, key = self._entry(cell, experiment, "report/"), self._keys[cell.id, f"report/{experiment.name}"]
                after = tuple(dict.fromkeys((*before, *(f"{cell.id}/{other}" for other in experiment.report_after))))
                yield Stage(f"{name}/report", {entry: key}, partial(report, experiment, reading), entry, after, "report", cell)

    @property
    def _whole_stages(self) -> Iterator[Stage]:
        """The tables and the ledger of the study, from what its cells report."""
        reports = [
            (cell.id, f"{cell.id}/{experiment.name}/report", self._entry(cell, experiment, "report/"))
            for cell in self.study.cells.values()
            for experiment in self._asked(cell)
            if experiment.tables or experiment.claims
        ]
        across = [experiment.across for experiment in experiments().values() if experiment.across]
        after, entries = tuple(name for _, name, _ in reports), [(cell, entry) for cell, _, entry in reports]
        for name, put_together, roots in (("tables", write_tables, across), ("claims.json", write_ledger, [])):
            key = key_of({"reports": entries}, [put_together, *roots])
            compute = partial(put_together, self.store, entries)
            yield Stage(name, {name: key}, compute, name, after, name)

    def stage(self, name: str) -> Stage:
        """Raises `UserError` where the study has no such stage."""
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            listed = "`sae-stability run STUDY --dry-run`, with the same options, lists its stages"
            raise UserError(f"stage: {self.study.name} has no {name}{nearest(name, stages)}; {listed}")
        return stages[name]

    def is_done(self, stage: Stage) -> bool:
        return all(self.store.is_done(entry, key) for entry, key in stage.entries.items())

    def compute(self, stages: Iterable[Stage]) -> None:
        """Compute what is missing of some stages, in their order.

        NumPy's products take one thread each: its threads spin as they wait for more, on the cores that PyTorch's then wait for.
        """
        for stage in stages:
            if not self.is_done(stage):
                with self.store.locked(stage.entries):  # somebody else may have computed it in the meantime
                    missing = {entry: key for entry, key in stage.entries.items() if not self.store.is_done(entry, key)}
                    if missing:
                        print(f"{self.study.name}: {stage.name}{_some(missing, stage)}", flush=True)
                        with self.store.computing(stage.group, missing) as work, threadpool_limits(1, user_api="blas"):
                            stage.compute(work)


def compute(study: Study) -> Store:
    """Compute what is missing of `study`, up to its claims."""
    plan = Plan(study)
    _use_threads(study)
    plan.store.write_study()
    plan.compute(plan.stages)
    return plan.store


def most_parts(stage: Stage) -> int:
    """Into how many parts a stage can be cut that know nothing of one another: the seeds of an ensemble."""
    return len(stage.entries) if stage.kind == ensembles.TRAINING and not stage.name.startswith(f"{SHARED}/streams/") else 1


def part_of(stage: Stage, number: int, parts: int) -> Stage:
    """One of several parts of a stage, counted from 1, with as many seeds as the others, or one more."""
    if parts == 1:
        return stage
    entries = dict(list(stage.entries.items())[number - 1 :: parts])
    return replace(stage, entries=entries, group=f"{stage.group}/.part-{number}-of-{parts}")


def compute_stage(study: Study, name: str, number: int = 1, parts: int = 1) -> None:
    """Compute one stage, or a part of it. Raises `UserError` that names what it needs, where that is not there."""
    plan = Plan(study)
    stage = plan.stage(name)
    most = most_parts(stage)
    if not 1 <= number <= parts <= most:
        raise UserError(f"--part {number}/{parts}: {name} can be cut into {most} at most; give one such as 1/{most}")
    stage = part_of(stage, number, parts)
    missing = [before for before in stage.after if not plan.is_done(plan.stage(before))]
    if missing:
        raise UserError(f"stage: {name} needs {', '.join(missing)}; compute that first, or call sae-stability run {study.name}")
    _use_threads(study)
    plan.store.write_study(anew=False)  # a part of another study of that name takes nothing from it
    plan.compute([stage])


def check(study: Study) -> None:
    """Raise `UserError` for what the schema can't see: hook points and tokens. What is tokenised is kept for `compute`."""
    plan = Plan(study)
    _use_threads(study)
    plan.compute([stage for stage in plan.stages if stage.name.startswith(f"{SHARED}/texts/")])
    for cell in study.cells.values():
        texts.check_tokens(study, cell, texts.facts(plan.results(cell)))
    for model in {cell.model for cell in study.cells.values()}:
        bridge = models.load(model)
        for hook_name in sorted({cell.hook_name for cell in study.cells.values() if cell.model == model}):
            models.check_hook(bridge, hook_name)
        narrow = [cell.d_sae for cell in study.cells.values() if cell.model == model and cell.d_sae < bridge.cfg.d_model]
        if narrow:
            told = f"d_sae: {min(narrow):,} features are fewer than the {bridge.cfg.d_model:,} dimensions of the model"
            warnings.warn(f"{told}; eight times as many as there are is usual", stacklevel=2)
    if study.device == "cuda" and not torch.cuda.is_available():
        warnings.warn("device: no GPU is seen on this machine; cuda works where a job finds one", stacklevel=2)


def compute_activations(study: Study) -> Results:
    """Compute what is missing of the text and the activations of `study`, and nothing behind them; the main cell's results."""
    plan = Plan(study)
    _use_threads(study)
    plan.compute(stage for stage in plan.stages if stage.name.startswith((f"{SHARED}/texts/", "activations/")))
    return plan.results(study.main)


def prompts(study: Study) -> Iterator[str]:
    """What the language model would be asked to explain, without asking it; what must be computed for that is kept."""
    plan = Plan(study)
    _use_threads(study)
    wanted = _behind(plan, plan.stage(f"{study.main.id}/explanations").after)
    plan.compute(stage for stage in plan.stages if stage.name in wanted)
    yield from explanations.prompts(plan.results(study.main))


def poolable(study: Study, cell: str | None, fine_tune: bool) -> Cell:
    """The cell whose SAEs are to be pooled, by its id, or the main one.

    Raises `UserError` where the study has no such cell, and where it keeps no training activations to fine-tune a pool on.
    """
    if cell is not None and cell not in study.cells:
        raise UserError(f"cell: {study.name} has no {cell}{nearest(cell, study.cells)}; it has {', '.join(study.cells)}")
    if fine_tune and study.stream:
        raise UserError("stream: this study keeps no training activations to fine-tune on; set stream to false")
    return study.main if cell is None else study.cells[cell]


def trained(study: Study, chosen: Cell) -> tuple[list[SAE], Activations]:
    """The SAEs of a cell on raw activations, and those of held-out text, computed if missing."""
    plan = Plan(study)
    _use_threads(study)
    plan.store.write_study(anew=False)  # a part of another study of that name takes nothing from it
    text = set(plan.results(chosen).entries["activations/real"])  # a stream trains without it
    names = [*_training(plan, chosen), *(stage.name for stage in plan.stages if text & set(stage.entries))]
    wanted = _behind(plan, names)
    plan.compute(stage for stage in plan.stages if stage.name in wanted)
    results = plan.results(chosen)
    ensemble = ensembles.ensemble(results)
    return [ensemble.dictionary(position) for position in range(len(ensemble.seeds))], texts.activations(results, "evaluation")


def fine_tuned(study: Study, chosen: Cell, pooled: SAE, decoder_alone: bool) -> SAE:
    """A pool of a cell that `trained` gave the SAEs of, trained on for a while as its seeds were, at their L0."""
    results = Plan(study).results(chosen)
    ensemble = ensembles.ensemble(results)
    seeds = pools.Seeds.of(ensemble, texts.activations(results, "train"), results.cell.threshold)
    start = pooling.joined([pooled], ensemble)
    return pools.fine_tuned(start, results.cell.recipe, seeds, study.device, decoder_alone).dictionary(0)


def _training(plan: Plan, cell: Cell) -> list[str]:
    """The names of the stages that train the ensemble of a cell, without its nulls."""
    entries = set(plan.results(cell).entries["ensembles/real"])
    return [stage.name for stage in plan.stages if entries & set(stage.entries)]


def _behind(plan: Plan, names: Iterable[str]) -> set[str]:
    """The names of some stages and of all that they read, all the way down."""
    waiting, wanted = list(names), set[str]()
    while waiting:
        stage = plan.stage(waiting.pop())
        if stage.name not in wanted:
            wanted.add(stage.name)
            waiting += stage.after
    return wanted


def report(experiment: Experiment, results: Results, work: Work) -> None:
    """Make the rows that a cell adds to the tables of a study, and the lines that it adds to the ledger."""
    for name, table in experiment.tables.items():
        write_table(work.folder / f"{name}.parquet", table(results))
    if experiment.claims is not None:
        write_json(work.folder / "claims.json", experiment.claims(results))


def write_tables(store: Store, reports: list[tuple[str, str]], work: Work) -> None:
    """The tables of a study: the rows of all its cells, and what is seen across them."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for cell, entry in reports:
        for file in sorted(store.path(entry).glob("*.parquet")):
            rows = pd.read_parquet(file)
            rows.insert(0, "cell", cell)
            parts.setdefault(file.stem, []).append(rows)
    # An empty part has no types, and would take those of the others away.
    tables = {
        name: pd.concat([part for part in all_parts if len(part)] or all_parts[:1], ignore_index=True)
        for name, all_parts in parts.items()
    }
    for experiment in experiments().values():
        if experiment.across is not None and "cells" in tables:  # which they compare
            tables = experiment.across(tables)
    for name, table in tables.items():
        write_table(work.folder / f"{name}.parquet", table)


def write_ledger(store: Store, reports: list[tuple[str, str]], work: Work) -> None:
    """The ledger of a study: the lines of its cells, main cell first, those over all of them, and one for each claim that none
    tests."""
    lines = []
    for cell, entry in reports:
        judged = store.path(entry) / "claims.json"
        lines += [{**line, "cell": cell} for line in (read_json(judged) if judged.is_file() else [])]
    lines += [{**line, "cell": store.study.main.id} for line in generality.judge(lines, store.study)]
    tested = {line["id"] for line in lines}
    untested = [{**ledger.not_tested(claim), "cell": store.study.main.id} for claim in ledger.CLAIMS if claim not in tested]
    cells, claims = list(store.study.cells), list(ledger.CLAIMS)
    write_json(work.folder, sorted(lines + untested, key=lambda line: (cells.index(line["cell"]), claims.index(line["id"]))))


def _compute(compute: Callable[[Results, Path], None], results: Results, work: Work) -> None:
    compute(results, work.folder)


def _some(missing: dict[str, str], stage: Stage) -> str:
    """How many of several are missing, such as seeds."""
    return f" ({len(missing)} of {len(stage.entries)})" if len(stage.entries) > 1 else ""


def _use_threads(study: Study) -> None:
    if study.threads is not None:
        torch.set_num_threads(study.threads)
