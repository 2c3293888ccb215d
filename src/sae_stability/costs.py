"""What the stages of a study cost before they run: seconds and memory (B1).

The *work* of a stage follows from the study: multiply-adds of a model that reads, of SAEs that train, of cosines. Seconds are what
a stage takes however small it is, and in proportion to its work what it takes beyond, both fitted to the stages of its kind that
were measured (`published/costs`); to which comes what starting a process takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from sae_stability import places
from sae_stability.ablation.effects import CHOSEN_AGAIN, REFITTED
from sae_stability.ablation.removal import JUDGED
from sae_stability.experiments import Stage, texts
from sae_stability.experiments.codes import CODE_TOKENS
from sae_stability.experiments.ensembles import TRAINING
from sae_stability.experiments.pools import TUNING, split
from sae_stability.experiments.rivals import PAID
from sae_stability.language.activations import layer_of
from sae_stability.pipeline import Plan
from sae_stability.study import Cell, Study
from sae_stability.subspaces.written import PARTS, WHOLE

START_SECONDS = 15.0
"""To start a process that reads the package, and to see what is done."""
START_GB = 1.0
"""What such a process holds before it computes."""
SPAN = 10.0
"""Times as much work as the least that the largest stage of a kind needs to have, for two numbers to be fitted to them."""
TUNED_PRODUCTS = 5
"""What is fine-tuned for each group of seeds that is pooled (`experiments.pools.compared`)."""
FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Size:
    """What the costs of a stage follow from."""

    tokens: int
    """Training tokens that a seed reads, passes counted."""
    held_out: int
    """Tokens to measure on."""
    seeds: int
    """Of the ensemble that is trained, or of the cell and all its nulls together."""
    d_in: int
    d_sae: int
    k: int
    batch: int
    parameters: int
    """Weights of the language model up to its last layer, without its vocabulary; of activations, up to the last site."""
    loss_tokens: int
    """Tokens on which the model is read with something removed."""
    trained: float = 0.0
    """What pools of the seeds have trained, in trainings of a seed."""


@dataclass(frozen=True)
class Law:
    """The seconds of a kind of stage, by its work."""

    per_work: float
    fixed: float = 0.0

    def seconds(self, work: float) -> float:
        return self.fixed + self.per_work * work


UNKNOWN = Law(1e-9)
"""Of a kind of which no stage was measured, where none of any kind was."""


def is_known(plan: Plan, stage: Stage) -> bool:
    """Whether the text is there, of which the sizes of its model are known."""
    return stage.cell is None or (plan.results(stage.cell).folder("text") / "facts.json").is_file()


def size(plan: Plan, stage: Stage) -> Size | None:
    """None for a stage that puts together what others computed. The text of the study has to be there, for the model's sizes."""
    cell, study = stage.cell, plan.study
    if cell is None or stage.kind in ("report", "text"):
        return None
    facts = texts.facts(plan.results(cell))
    every = sum(len(cell.seeds_of(kind)) for kind in cell.kinds)
    read = max((layer_of(other.hook_name) or 0) + 1 for other in study.cells.values() if other.model == cell.model)
    return Size(
        tokens=cell.tokens * cell.passes,
        held_out=min(cell.evaluation_tokens, facts["evaluation_tokens"]),
        seeds=len(stage.entries) if stage.kind == TRAINING else every,
        d_in=facts["d_model"],
        d_sae=cell.d_sae,
        k=cell.k,
        batch=cell.batch,
        parameters=12 * (read if stage.kind == "activations" else facts["layers"]) * facts["d_model"] ** 2,
        loss_tokens=study.loss_tokens + study.ablation_tokens,
        trained=_trained(study, cell) if stage.kind == "pooling" else 0.0,
    )


def _trained(study: Study, cell: Cell) -> float:
    """Fine-tuning of pools, and where a study pays for it what costs as much: longer, wider, and one after another."""
    groups = split(len(cell.seed_list), 0, study.pool_size)
    paid = min(PAID, len(groups)) * (2 * len(groups[0]) + TUNING + len(groups[0]) - 1) if study.pool_controls else 0
    return TUNED_PRODUCTS * len(groups) * TUNING + paid


def work(kind: str, of: Size) -> float:
    """Multiply-adds of a stage, up to a factor of its kind."""
    reads, encodes = of.parameters * (of.tokens + of.held_out), of.d_in * of.d_sae
    if kind == "activations":
        return reads
    if kind == "null source":
        return (of.tokens + of.held_out) * of.d_in**2
    of_a_seed = of.tokens * of.d_in * (of.d_sae + 6 * of.k)  # the encoder's product, and six of the rows that fire
    if kind == TRAINING:
        return of.seeds * of_a_seed
    if kind == "matching":
        return of.seeds**2 / 2 * of.d_sae**2 * of.d_in + of.seeds * CODE_TOKENS * encodes
    if kind == "function":
        again = REFITTED * of.d_sae + min(JUDGED, REFITTED * of.d_sae)
        pursued = len(CHOSEN_AGAIN) * again * of.k * of.d_sae
        return of.seeds * (pursued + of.parameters * of.loss_tokens)
    reading = of.seeds * (min(CODE_TOKENS, of.held_out) * encodes + of.parameters * of.loss_tokens)
    return reading + of.trained * of_a_seed


def memory_gb(kind: str, of: Size | None) -> float:
    """What the process of a stage holds at most, about."""
    if of is None:
        return 2 * START_GB
    weights = of.d_in * of.d_sae
    if kind == TRAINING:  # both weights and Adam's two moments of each, a batch, and gradients
        held = of.seeds * FLOAT * (8 * weights + of.batch * of.d_in)
    elif kind == "function":  # cosines of all features with one another, and the normal equations of two decoders
        held = of.d_sae**2 * (2 * FLOAT + 4 * DOUBLE) + of.seeds * CODE_TOKENS * of.k * 3 * FLOAT
    else:
        held = of.seeds * (FLOAT * 2 * weights + CODE_TOKENS * of.k * 3 * FLOAT)
    if kind in ("subspaces", "groups"):  # the products of all features, of the ensemble and of a null
        held += 2 * of.seeds * min(WHOLE, PARTS * of.d_sae**2 * DOUBLE)
    return START_GB + (FLOAT * of.parameters + CODE_TOKENS * of.d_in * FLOAT + held) / 1e9


def seconds(kind: str, of: Size | None, laws: Mapping[str, Law] | None = None) -> float:
    """What a stage takes, about; `laws` are those of `published` where none are given. A kind without one takes as long as any."""
    if of is None:
        return START_SECONDS
    laws = published() if laws is None else laws
    known = [laws[kind]] if kind in laws else list(laws.values()) or [UNKNOWN]
    return START_SECONDS + max(law.seconds(work(kind, of)) for law in known)


def graph(plan: Plan) -> dict[str, set[str]]:
    """Which kinds of stages each kind reads, in the order of the plan; what puts rows together is left out."""
    kind_of = {stage.name: stage.kind for stage in plan.stages}
    reads: dict[str, set[str]] = {}
    for stage in plan.stages:
        if stage.cell is not None and stage.kind != "report":
            reads.setdefault(stage.kind, set()).update({kind_of[name] for name in stage.after} - {stage.kind})
    return reads


def fitted(jobs: pd.DataFrame) -> dict[str, Law]:
    """The law of each kind. Columns: kind, work, seconds."""
    return {str(kind): _law(of_kind) for kind, of_kind in jobs.groupby("kind")}


def _law(jobs: pd.DataFrame) -> Law:
    """Seconds in proportion to work, at the median rate; where stages of a kind are of different sizes, beside a fixed part, by
    least squares of relative errors. Where the largest takes no longer than others, at its rate: something always grows."""
    work, taken = jobs["work"].to_numpy(), jobs["seconds"].clip(lower=0.1).to_numpy()
    largest = work.argmax()
    if work[largest] < SPAN * work.min():
        return Law(float(np.exp(np.median(np.log(taken / work)))))
    (fixed, grows), _ = nnls(np.stack([np.ones(len(work)), work / work[largest]], 1) / taken[:, None], np.ones(len(work)))
    return Law(float(grows / work[largest]), float(fixed)) if grows > 0 else Law(float(taken[largest] / work[largest]))


@cache
def published() -> dict[str, Law]:
    """The laws of the stages that were measured; none where there is no such table."""
    path = places.published() / "costs" / "jobs.parquet"
    return fitted(pd.read_parquet(path)) if path.is_file() else {}


def measured(plan: Plan) -> pd.DataFrame:
    """One row a finished stage of a study: its kind, sizes and work, and the seconds and memory that it took.

    The memory is that of a process, which may have computed other stages before.
    """
    rows = []
    for stage in plan.stages:
        of = size(plan, stage)
        provenances = [plan.store.provenance(entry) for entry in stage.entries]
        if of is None or not all(provenances):
            continue
        found = [provenance for provenance in provenances if provenance]
        row = {"stage": stage.name, "kind": stage.kind, **vars(of), "work": work(stage.kind, of)}
        row |= {"seconds": sum(each["seconds"] for each in found), "memory_gb": max(each["peak_memory_gb"] for each in found)}
        rows.append(row | {name: found[0][name] for name in ("processor", "threads", "device", "commit")})
    return pd.DataFrame(rows)


def error(jobs: pd.DataFrame) -> pd.DataFrame:
    """How far estimates of jobs lie from what they took, each from the other jobs of its kind: `ratio` of estimate to truth.

    A kind with one job has nothing to be estimated from: nan.
    """

    def ratio(job: pd.Series) -> float:
        others = jobs[(jobs["kind"] == job["kind"]) & (jobs.index != job.name)]
        return _law(others).seconds(job["work"]) / max(job["seconds"], 0.1) if len(others) else np.nan

    return jobs.assign(ratio=jobs.apply(ratio, axis=1))


def by_kind(jobs: pd.DataFrame) -> pd.DataFrame:
    """How well what jobs take is known beforehand: one row a kind, longest first. Columns of `jobs`: those of `error`.

    Columns: kind, jobs, seconds (the median), rate (work a second, the median), fixed (seconds of its law, however small the work),
    error (the factor within which half of the estimates lie).
    """
    factor, rate = np.exp(np.abs(np.log(jobs["ratio"]))), jobs["work"] / jobs["seconds"].clip(lower=0.1)
    found = jobs.assign(error=factor, rate=rate).groupby("kind")
    table = found.agg(jobs=("stage", "size"), seconds=("seconds", "median"), rate=("rate", "median"), error=("error", "median"))
    table["fixed"] = [law.fixed for law in fitted(jobs).values()]
    return table.sort_values("seconds", ascending=False).reset_index()


def elsewhere(sizes: Mapping[str, Size], kinds: Sequence[str], laws: Mapping[str, Law]) -> pd.DataFrame:
    """What one cell would take at other sizes, by the laws of the machine that was measured: one row a name and kind.

    Columns: name, kind, hours, memory_gb. The last row of each name, `all`, has the sum of hours and the largest memory.
    """
    rows = []
    for name, of in sizes.items():
        hours = {kind: seconds(kind, of, laws) / 3600 for kind in kinds}
        memory = {kind: memory_gb(kind, of) for kind in kinds}
        rows += [{"name": name, "kind": kind, "hours": hours[kind], "memory_gb": memory[kind]} for kind in kinds]
        rows.append({"name": name, "kind": "all", "hours": sum(hours.values()), "memory_gb": max(memory.values())})
    return pd.DataFrame(rows)
