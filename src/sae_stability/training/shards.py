"""Whole ensembles: seeds in shards that fit in memory, each resumed where it stopped, put together at the end."""

import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from sae_stability.errors import UserError
from sae_stability.files import TEMPORARY, drop, read_json, read_metadata, save_tensors, write_json
from sae_stability.language.activations import Blocks
from sae_stability.saes.ensemble import Ensemble
from sae_stability.study import Recipe
from sae_stability.training.loop import CHECKPOINT, SNAPSHOTS, Training

JOB, ENSEMBLE, CURVE, DIVERGED, SHARDS = "job.json", "ensemble.safetensors", "curve.json", "diverged.json", "shards"
CHECKPOINT_SECONDS = 20
MEMORY_SHARE = 0.5  # of the machine's, that the seeds under training may take


@dataclass(frozen=True)
class Job:
    """An ensemble to train: seeds of a recipe on blocks of activations, into a folder."""

    recipe: Recipe
    blocks: Blocks
    seeds: Sequence[int]
    folder: Path | None
    coefficients: Sequence[float]
    """Of the sparsity penalty, one a seed."""

    @property
    def visits(self) -> list[int]:
        """How many steps each visit to a block takes. What does not fill a batch is left out."""
        return [size // self.recipe.batch for size in self.blocks.sizes] * self.recipe.passes

    def part(self, positions: Sequence[int]) -> "Job":
        """A shard of the seeds, with a folder of its own."""
        seeds = [self.seeds[position] for position in positions]
        folder = self.folder and self.folder / SHARDS / f"{seeds[0]}-{len(seeds)}"
        return replace(self, seeds=seeds, folder=folder, coefficients=[self.coefficients[position] for position in positions])


def train_all(
    jobs: Sequence[Job],
    described: str,
    device: torch.device,
    at_once: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[Ensemble]:
    """Train the ensembles of all `jobs`, at most `at_once` seeds at a time; by default as many as fit in memory.

    Jobs whose blocks come from one stream share its forward passes. With folders, the run can be killed at any moment and resumes
    to the same bits. Each folder then holds `ensemble.safetensors`, `curve.json` (explained variance, L0 and dead features of
    each seed as training goes), `snapshots/STEP.safetensors` (decoders on the way) and `diverged.json` (where seeds stopped).

    Seeds that diverge are left out of their ensemble. Raises `UserError` where no step can be taken, or where a folder holds
    another training.
    """
    for job in jobs:
        _claim(job)
    done = {
        index: Ensemble.open(job.folder / ENSEMBLE)
        for index, job in enumerate(jobs)
        if job.folder and (job.folder / ENSEMBLE).exists()
    }
    parts: list[list[tuple[Job, Ensemble]]] = [[] for _ in jobs]
    total = sum(sum(job.visits) * job.recipe.batch * len(job.seeds) for index, job in enumerate(jobs) if index not in done)
    with tqdm(desc=described, total=total, unit="tok", unit_scale=True, disable=None) as bar:
        for group in _groups(jobs, done, device, at_once):
            shards = {index: jobs[index].part(positions) for index, positions in group.items()}
            trained = _train(list(shards.values()), device, checkpoint_seconds, bar)
            for (index, shard), ensemble in zip(shards.items(), trained, strict=True):
                parts[index].append((shard, ensemble))
    return [done[index] if index in done else _joined(job, parts[index]) for index, job in enumerate(jobs)]


def _claim(job: Job) -> None:
    """Mark the job's folder as its own, and clear what an interrupted run left half-written."""
    if sum(job.visits) == 0:
        raise UserError(f"batch: {job.recipe.batch:,} tokens are more than any block of activations has; lower batch")
    if job.folder is None:
        return
    described = {
        "recipe": job.recipe.recipe.model_dump(mode="json"),  # of a cell, what is trained only
        "seeds": list(job.seeds),
        "coefficients": list(job.coefficients),
        "blocks": list(job.blocks.sizes),
    }
    if (job.folder / JOB).exists() and read_json(job.folder / JOB) != described:
        raise UserError(f"folder: {job.folder} holds another training; give an empty one")
    write_json(job.folder / JOB, described)
    drop(job.folder.rglob(f"{TEMPORARY}*"))
    if (job.folder / ENSEMBLE).exists():
        shutil.rmtree(job.folder / SHARDS, ignore_errors=True)


def _groups(jobs: Sequence[Job], done: Container[int], device: torch.device, at_once: int | None) -> list[dict[int, list[int]]]:
    """Which seeds train at a time: positions among a job's seeds, by the job's index."""
    # All of the memory, not what is free: a run that resumes must find the shards that it began.
    free = MEMORY_SHARE * (torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total)
    groups: list[dict[int, list[int]]] = [{}]
    seeds, memory = 0, 0
    for index, job in enumerate(jobs):
        if index in done:
            continue
        parameters = 2 * job.recipe.d_sae * job.blocks.d_in
        each = 4 * (3 * parameters + job.recipe.batch * job.blocks.d_in)  # with Adam's two moments, and a batch
        for position in range(len(job.seeds)):
            if groups[-1] and (seeds == at_once or memory + each > free):
                groups.append({})
                seeds, memory = 0, 0
            groups[-1].setdefault(index, []).append(position)
            seeds, memory = seeds + 1, memory + each
    return [group for group in groups if group]


def _train(shards: list[Job], device: torch.device, checkpoint_seconds: float, bar: tqdm) -> list[Ensemble]:
    """Train the seeds of some shards together, or take what an earlier run finished."""
    finished = [shard.folder is not None and (shard.folder / ENSEMBLE).exists() for shard in shards]
    trainings = {}
    for index, shard in enumerate(shards):
        if not finished[index]:
            inputs = (shard.recipe, shard.seeds, shard.coefficients, shard.visits, shard.blocks.d_in, shard.folder)
            trainings[index] = Training(*inputs, device, checkpoint_seconds, bar)
    for visit in range(max(len(shard.visits) for shard in shards)):
        for index, training in trainings.items():
            if training.wants(visit):
                training.consume(visit, shards[index].blocks.block(visit % len(shards[index].blocks.sizes)))
    ensembles = []
    for index, shard in enumerate(shards):
        if finished[index] and shard.folder is not None:
            bar.update(sum(shard.visits) * shard.recipe.batch * len(shard.seeds))
            ensembles.append(Ensemble.open(shard.folder / ENSEMBLE))
            continue
        training = trainings.pop(index)
        ensemble = training.finish(shard.blocks.block(training.last_visit % len(shard.blocks.sizes)))
        if shard.folder is not None:
            write_json(shard.folder / CURVE, training.curve)
            diverged = {trainee.seed: trainee.diverged for trainee in training.trainees if trainee.diverged is not None}
            write_json(shard.folder / DIVERGED, diverged)
            ensemble.save(shard.folder / ENSEMBLE)
            (shard.folder / CHECKPOINT).unlink(missing_ok=True)
        ensembles.append(ensemble)
    return ensembles


def _joined(job: Job, parts: list[tuple[Job, Ensemble]]) -> Ensemble:
    """The ensemble of a job from those of its shards, and its files from theirs."""
    ensemble = Ensemble.joined([ensemble for _, ensemble in parts])
    if job.folder is None:
        return ensemble
    folders = [shard.folder for shard, _ in parts if shard.folder is not None]
    curve = [row for folder in folders for row in read_json(folder / CURVE)]
    order = {seed: place for place, seed in enumerate(job.seeds)}
    write_json(job.folder / CURVE, sorted(curve, key=lambda row: (row["tokens"], order[row["seed"]])))
    write_json(job.folder / DIVERGED, {seed: step for folder in folders for seed, step in read_json(folder / DIVERGED).items()})
    for name in sorted({file.name for folder in folders for file in (folder / SNAPSHOTS).glob("*.safetensors")}):
        files = [folder / SNAPSHOTS / name for folder in folders if (folder / SNAPSHOTS / name).exists()]
        seeds = [seed for file in files for seed in read_metadata(file)["seeds"]]
        lasted = [seeds.index(seed) for seed in ensemble.seeds]
        W_dec = torch.cat([load_file(file)["W_dec"] for file in files])[lasted]
        save_tensors(job.folder / SNAPSHOTS / name, {"W_dec": W_dec}, read_metadata(files[0]) | {"seeds": ensemble.seeds})
    ensemble.save(job.folder / ENSEMBLE)
    shutil.rmtree(job.folder / SHARDS)
    return ensemble
