"""Trains all seeds of a cell together, over one file of activations.

A seed sets the initialisation and the order of the data, each of which can be held fixed on its own. Seeds share nothing
but the file: a seed trained alone and the same seed trained in company give the same SAE, bit for bit.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sae_stability.config import Cell, UserError
from sae_stability.language.activations import Activations
from sae_stability.saes import Parameters, variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.store import read_metadata, save_tensors, write_json

CURVE_POINTS = 100  # the training curve's resolution
SNAPSHOT_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the steps: decoders kept to see stability grow
CHECKPOINT = "checkpoint.safetensors"
INITIALISATION, ORDER = 0, 1  # what a stream of random numbers is for


@dataclass
class Trainee:
    """One seed under training."""

    seed: int
    sae: Parameters
    gradient: Parameters
    optimizer: torch.optim.Adam
    last_fired: Int[Tensor, "d_sae"]
    """The step at which each feature fired last."""
    order: Int[np.ndarray, "token"]
    """The order in which this pass reads the tokens."""


def train(
    cell: Cell,
    activations: Activations | Float[Tensor, "token d_in"],
    seeds: Sequence[int],
    folder: Path | None = None,
    described: str = "training",
    checkpoint_seconds: float = 20,
) -> Ensemble:
    """Train one SAE of `cell` for each of `seeds` on `activations`.

    With a `folder`, the run can be killed at any moment and resumes to the same bits; the folder then also gets
    `curve.json` (explained variance, L0 and dead features of each seed as training goes) and `snapshots/STEP.safetensors`
    (decoders on the way). Adam's rate rises linearly, stays, and falls linearly to zero.

    Raises `UserError` where there are fewer activations than the cell's tokens, or where a seed diverges.
    """
    if isinstance(activations, Tensor):
        activations = Activations.of(activations)
    if len(activations) < cell.tokens:
        raise UserError(f"tokens: {cell.tokens:,} wanted and {len(activations):,} there; lower tokens (and raise passes)")
    method = variant(cell.variant, cell.k)
    steps_per_pass = cell.tokens // cell.batch
    steps = steps_per_pass * cell.passes
    records = {max(1, round(steps * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)}
    snapshots = {max(1, round(steps * share)) for share in SNAPSHOT_SHARES}

    trainees = [_begin(cell, method, activations.d_in, seed) for seed in seeds]
    first, curve = _resume(folder, trainees)
    saved = time.monotonic()
    sums = np.zeros((len(trainees), 3))  # squared error, squared norm, features firing
    since = first
    bar = tqdm(range(first, steps), described, initial=first, total=steps, unit="step", disable=None)
    for step in bar:
        rate = cell.rate * schedule(step / steps, cell.warmup, cell.decay)
        for trainee, total in zip(trainees, sums, strict=True):
            if step % steps_per_pass == 0 or trainee.order is None:
                trainee.order = _order(cell, trainee.seed, step // steps_per_pass)
            start = step % steps_per_pass * cell.batch
            rows = torch.from_numpy(trainee.order[start : start + cell.batch].astype(np.int64))
            x = activations.normalised(rows)
            total += _step(trainee, method, x, step, rate, cell)
        if step + 1 in snapshots and folder is not None:
            save_tensors(
                folder / "snapshots" / f"{step + 1}.safetensors",
                {"W_dec": _stack(trainees).W_dec},
                {"tokens": (step + 1) * cell.batch},
            )
        if step + 1 in records:
            curve += _curve_rows(trainees, sums, step + 1, since, cell)
            sums[:], since = 0, step + 1
            last = curve[-len(trainees) :]
            bar.set_postfix(
                explained=f"{np.mean([row['explained_variance'] for row in last]):.3f}",
                dead=f"{np.mean([row['dead'] for row in last]):.0f}",
            )
            if folder is not None and time.monotonic() - saved > checkpoint_seconds:
                _save(folder, step + 1, trainees, curve)
                saved = time.monotonic()

    ensemble = Ensemble(cell.variant, cell.k, list(seeds), _stack(trainees), activations.mean, activations.scale)
    if folder is not None:
        write_json(folder / "curve.json", curve)
        ensemble.save(folder / "ensemble.safetensors")
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return ensemble


def schedule(progress: float, warmup: float, decay: float) -> float:
    """Share of the peak rate at `progress` in [0, 1): a trapezium that starts above zero and ends at zero."""
    rising = (progress + 1e-3) / warmup if warmup else 1.0
    falling = (1 - progress) / decay if decay else 1.0
    return min(1.0, rising, falling)


def _begin(cell: Cell, method, d_in: int, seed: int) -> Trainee:
    generator = torch.Generator().manual_seed(_stream(0 if cell.fixed_initialisation else seed, INITIALISATION))
    sae = method.initialise(d_in, cell.d_sae, generator)
    gradient = Parameters(*(torch.zeros_like(tensor) for tensor in sae))
    for parameter, into in zip(sae, gradient, strict=True):
        parameter.grad = into
    optimizer = torch.optim.Adam(list(sae), lr=cell.rate, fused=True)
    return Trainee(seed, sae, gradient, optimizer, torch.zeros(cell.d_sae, dtype=torch.int64), None)


def _order(cell: Cell, seed: int, which_pass: int) -> Int[np.ndarray, "token"]:
    generator = np.random.default_rng(_stream(0 if cell.fixed_order else seed, ORDER, which_pass))
    return generator.permutation(np.arange(cell.tokens, dtype=np.int32))


def _stream(seed: int, *purpose: int) -> int:
    """Independent random streams from one seed."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0] >> 1)


def _step(
    trainee: Trainee, method, x: Float[Tensor, "batch d_in"], step: int, rate: float, cell: Cell
) -> tuple[float, float, float]:
    """One step of Adam; returns the batch's squared error, squared norm and firings, each per token."""
    sae, gradient = trainee.sae, trainee.gradient
    dead = (step - trainee.last_fired) * cell.batch > cell.dead_after
    error, codes = method.gradients(sae, gradient, x, dead)
    error = error.item()
    if not np.isfinite(error):
        raise UserError(f"rate: the training of seed {trainee.seed} diverged at step {step}; lower rate")
    # A direction has no length to learn: the gradient along it would only fight the normalisation below.
    gradient.W_dec.sub_(sae.W_dec * (gradient.W_dec * sae.W_dec).sum(1, keepdim=True))
    trainee.optimizer.param_groups[0]["lr"] = rate
    trainee.optimizer.step()
    F.normalize(sae.W_dec, dim=1, out=sae.W_dec)
    fires = codes.values > 0
    trainee.last_fired[codes.indices[fires]] = step
    return error, x.square().sum(1).mean().item(), fires.sum().item() / len(x)


def _stack(trainees: list[Trainee]) -> Parameters:
    return Parameters(*(torch.stack(tensors) for tensors in zip(*(trainee.sae for trainee in trainees), strict=True)))


def _curve_rows(trainees: list[Trainee], sums: Float[np.ndarray, "seed 3"], done: int, since: int, cell: Cell) -> list[dict]:
    dead_steps = cell.dead_after / cell.batch
    return [
        {
            "seed": trainee.seed,
            "tokens": done * cell.batch,
            "explained_variance": 1 - error / norm,
            "l0": firings / (done - since),
            "dead": int((done - 1 - trainee.last_fired > dead_steps).sum()),
        }
        for trainee, (error, norm, firings) in zip(trainees, sums.tolist(), strict=True)
    ]


def _save(folder: Path, step: int, trainees: list[Trainee], curve: list[dict]) -> None:
    tensors = {}
    for trainee in trainees:
        for name, parameter in trainee.sae._asdict().items():
            state = trainee.optimizer.state[parameter]
            tensors |= {
                f"{trainee.seed}/{name}": parameter,
                f"{trainee.seed}/{name}/exp_avg": state["exp_avg"],
                f"{trainee.seed}/{name}/exp_avg_sq": state["exp_avg_sq"],
            }
        tensors[f"{trainee.seed}/last_fired"] = trainee.last_fired
    save_tensors(folder / CHECKPOINT, tensors, {"step": step, "curve": curve})


def _resume(folder: Path | None, trainees: list[Trainee]) -> tuple[int, list[dict]]:
    """Put `trainees` back to the last checkpoint, if there is one; give the step to go on from and the curve so far."""
    if folder is None or not (folder / CHECKPOINT).exists():
        return 0, []
    tensors, metadata = load_file(folder / CHECKPOINT), read_metadata(folder / CHECKPOINT)
    for trainee in trainees:
        for name, parameter in trainee.sae._asdict().items():
            parameter.copy_(tensors[f"{trainee.seed}/{name}"])
            trainee.optimizer.state[parameter] = {
                "step": torch.tensor(float(metadata["step"])),
                "exp_avg": tensors[f"{trainee.seed}/{name}/exp_avg"],
                "exp_avg_sq": tensors[f"{trainee.seed}/{name}/exp_avg_sq"],
            }
        trainee.last_fired.copy_(tensors[f"{trainee.seed}/last_fired"])
    return metadata["step"], metadata["curve"]
