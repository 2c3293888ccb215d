"""The training loop: some seeds of a recipe, step by step, over one block of activations after another.

A seed sets the initialisation and the order of the data, each of which can be held fixed on its own. Seeds share nothing
but the activations: a seed trained alone and the same seed trained in company give the same SAE, on a CPU bit for bit.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.files import read_metadata, save_tensors
from sae_stability.language.activations import Activations
from sae_stability.saes import fastest_dtype, variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sparse import Parameters
from sae_stability.saes.variant import Variant
from sae_stability.study import Recipe
from sae_stability.training.revival import revive
from sae_stability.training.shuffling import ROUNDS, shuffled

CURVE_POINTS = 100  # the training curve's resolution
SNAPSHOT_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the steps: decoders kept to see stability grow
DIVERGED = 100  # times the squared norm of the activations: a larger squared error is no training any more
FINISHING_BATCHES = 16  # of the last tokens, for what a variant measures once its training has ended
STRETCH = 16  # steps that a seed takes before the others get their turn
CHECKPOINT = "checkpoint.safetensors"
SNAPSHOTS = "snapshots"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
INITIALISATION, ORDER = 0, 1  # what a stream of random numbers is for


@dataclass
class Trainee:
    """One seed under training."""

    seed: int
    method: Variant
    sae: Parameters
    optimizer: torch.optim.Adam
    last_fired: Int[Tensor, "d_sae"]
    """The step at which each feature fired last."""
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Squared error, squared norm and firings a token, summed over the steps since the curve's last point."""
    diverged: int | None = None
    """The step at which it was stopped."""


class Training:
    """Seeds of one recipe under training. `visits` holds how many steps each visit to a block of activations takes."""

    def __init__(
        self,
        recipe: Recipe,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        visits: Sequence[int],
        d_in: int,
        folder: Path | None,
        device: torch.device,
        checkpoint_seconds: float,
        bar: tqdm,
    ):
        self.recipe, self.visits, self.folder, self.device, self.bar = recipe, visits, folder, device, bar
        self.checkpoint_seconds, self.saved_at = checkpoint_seconds, time.monotonic()
        self.steps = sum(visits)
        self.records = {max(1, round(self.steps * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)}
        self.snapshots = {max(1, round(self.steps * share)) for share in SNAPSHOT_SHARES}
        self.events = self.records | self.snapshots
        self.step, self.since = 0, 0
        self.curve: list[dict] = []

        kind, dtype = variant(recipe.variant), fastest_dtype(device) if recipe.encoder == "fastest" else torch.float32
        methods = [kind(recipe.k, coefficient, dtype) for coefficient in coefficients]
        for position, (method, seed) in enumerate(zip(methods, seeds, strict=True)):
            begun = method.initialise(d_in, recipe.d_sae, _generator(recipe, seed))
            if position == 0:
                self.parameters = kind.parameters(*(torch.empty(len(seeds), *tensor.shape, device=device) for tensor in begun))
            for stacked, tensor in zip(self.parameters, begun, strict=True):
                stacked[position] = tensor
        self.trainees = [self._trainee(position, *of) for position, of in enumerate(zip(seeds, methods, strict=True))]
        self.workers = threads.workers(len(seeds)) if device.type == "cpu" else 1
        self.gradients: SimpleQueue[Parameters] = SimpleQueue()  # one a worker, not one a seed
        for _ in range(self.workers):
            self.gradients.put(kind.parameters(*(torch.zeros_like(tensor[0]) for tensor in self.parameters)))
        if folder is not None and (folder / CHECKPOINT).exists():
            self._resume(folder / CHECKPOINT)
        bar.update(self.step * recipe.batch * len(self.trainees))

    @property
    def running(self) -> list[Trainee]:
        return [trainee for trainee in self.trainees if trainee.diverged is None]

    def wants(self, visit: int) -> bool:
        """Whether this visit has steps that were not taken before an interruption."""
        return self.step < sum(self.visits[: visit + 1]) and bool(self.running)

    def consume(self, visit: int, block: Activations) -> None:
        """Take the steps of one visit to a block."""
        first = sum(self.visits[:visit])
        end = first + self.visits[visit]
        with threads.pool(self.workers) as pool:
            while self.step < end and self.running:
                stop = min(end, self.step + STRETCH, min(event for event in self.events if event > self.step))
                steps = range(self.step, stop)
                list(pool.map(partial(self._advance, steps=steps, visit=visit, first=first, block=block), self.running))
                self.step = stop
                self.bar.update(self.recipe.batch * len(steps) * len(self.trainees))
                self._mark()

    def _mark(self) -> None:
        """Keep what is due at this step: a snapshot, a point of the curve, a checkpoint."""
        if self.step in self.snapshots and self.folder is not None:
            metadata = {"tokens": self.step * self.recipe.batch, "seeds": [trainee.seed for trainee in self.trainees]}
            save_tensors(self.folder / SNAPSHOTS / f"{self.step}.safetensors", {"W_dec": self.parameters.W_dec}, metadata)
        if self.step in self.records and self.running:
            self._record()
        if self.folder is not None and time.monotonic() - self.saved_at > self.checkpoint_seconds:
            self._save(self.folder / CHECKPOINT)

    @property
    def last_visit(self) -> int:
        """The last visit that has steps: what is left at the end of a stream can be less than a batch."""
        return max(visit for visit, steps in enumerate(self.visits) if steps)

    def finish(self, block: Activations) -> Ensemble:
        """The ensemble of the seeds that did not diverge; `block` is that of `last_visit`."""
        last = self.last_visit
        for trainee in self.running:
            batches = range(max(0, self.visits[last] - FINISHING_BATCHES), self.visits[last])
            trainee.method.finish(trainee.sae, (self._batch(trainee, last, place, block) for place in batches))
        kept = [position for position, trainee in enumerate(self.trainees) if trainee.diverged is None]
        parameters = self.parameters
        if len(kept) < len(self.trainees):
            parameters = type(parameters)(*(tensor[kept] for tensor in parameters))
        parameters = type(parameters)(*(tensor.cpu() for tensor in parameters))
        seeds = [self.trainees[position].seed for position in kept]
        coefficient = self.trainees[0].method.coefficient
        return Ensemble(self.recipe.variant, self.recipe.k, seeds, parameters, block.mean, block.scale, coefficient)

    def _trainee(self, position: int, seed: int, method: Variant) -> Trainee:
        sae = type(self.parameters)(*(tensor[position] for tensor in self.parameters))
        optimizer = torch.optim.Adam(list(sae), lr=self.recipe.rate, fused=True)
        return Trainee(seed, method, sae, optimizer, torch.zeros(self.recipe.d_sae, dtype=torch.int64, device=self.device))

    def _batch(self, trainee: Trainee, visit: int, place: int, block: Activations) -> Float[Tensor, "batch d_in"]:
        recipe = self.recipe
        keys = _random(0 if recipe.fixed_order else trainee.seed, ORDER, visit).generate_state(ROUNDS, np.uint64)
        rows = shuffled(len(block), keys, place * recipe.batch, (place + 1) * recipe.batch)
        return block.normalised(torch.from_numpy(rows)).to(self.device)

    def _advance(self, trainee: Trainee, steps: range, visit: int, first: int, block: Activations) -> None:
        """Take steps of one seed, until it diverges. `first` is the visit's first step."""
        gradient = self.gradients.get()
        try:
            for step in steps:
                if trainee.diverged is None:
                    self._step(trainee, gradient, self._batch(trainee, visit, step - first, block), step)
        finally:
            self.gradients.put(gradient)

    def _step(self, trainee: Trainee, gradient: Parameters, x: Float[Tensor, "batch d_in"], step: int) -> None:
        """One step of Adam. A seed that diverges takes no more."""
        recipe, sae = self.recipe, trainee.sae
        error, codes = trainee.method.gradients(sae, gradient, x)
        squared_error, squared_norm = _mean_square(error), _mean_square(x)
        if not squared_error <= DIVERGED * squared_norm:  # NaN compares as false
            trainee.diverged = step
            self.bar.write(f"seed {trainee.seed} diverged at step {step} and stops; the others go on")
            return
        dead = (step - trainee.last_fired) * recipe.batch > recipe.dead_after
        if dead.any():
            revive(sae, gradient, x - sae.b_dec, error, dead)
        if trainee.method.unit_decoder:
            # A direction has no length to learn: the gradient along it would only fight the normalisation below.
            gradient.W_dec.addcmul_(sae.W_dec, torch.linalg.vecdot(gradient.W_dec, sae.W_dec)[:, None], value=-1)
        if recipe.clip is not None:
            _clip(gradient, recipe.clip)
        for parameter, its in zip(sae, gradient, strict=True):
            parameter.grad = its
        trainee.optimizer.param_groups[0]["lr"] = recipe.rate * schedule(step / self.steps, recipe.warmup, recipe.decay)
        trainee.optimizer.step()
        if trainee.method.unit_decoder:
            F.normalize(sae.W_dec, dim=1, out=sae.W_dec)
        fired = codes.fired()
        trainee.last_fired[fired] = step
        for place, value in enumerate((squared_error, squared_norm, len(fired) / len(x))):
            trainee.sums[place] += value

    def _record(self) -> None:
        """Add a point to the curve, and show the mean over seeds."""
        dead_steps = self.recipe.dead_after / self.recipe.batch
        rows = [
            {
                "seed": trainee.seed,
                "tokens": self.step * self.recipe.batch,
                "explained_variance": 1 - trainee.sums[0] / trainee.sums[1],
                "l0": trainee.sums[2] / (self.step - self.since),
                "dead": int((self.step - 1 - trainee.last_fired > dead_steps).sum()),
            }
            for trainee in self.running
        ]
        self.curve += rows
        for trainee in self.running:
            trainee.sums = [0.0, 0.0, 0.0]
        self.since = self.step
        mean = {name: np.mean([row[name] for row in rows]) for name in ("explained_variance", "l0", "dead")}
        self.bar.set_postfix_str(f"explained {mean['explained_variance']:.3f}, L0 {mean['l0']:.1f}, dead {mean['dead']:.0f}")

    def _save(self, checkpoint: Path) -> None:
        tensors = {f"parameters/{name}": tensor for name, tensor in self.parameters._asdict().items()}
        for trainee in self.running:
            tensors[f"{trainee.seed}/last_fired"] = trainee.last_fired
            for name, parameter in trainee.sae._asdict().items():
                state = trainee.optimizer.state[parameter]
                tensors |= {f"{trainee.seed}/{name}/{moment}": state[moment] for moment in MOMENTS}
        metadata = {
            "step": self.step,
            "since": self.since,
            "sums": [trainee.sums for trainee in self.trainees],
            "diverged": [trainee.diverged for trainee in self.trainees],
            "curve": self.curve,
        }
        save_tensors(checkpoint, tensors, metadata)
        self.saved_at = time.monotonic()

    def _resume(self, checkpoint: Path) -> None:
        tensors, metadata = load_file(checkpoint), read_metadata(checkpoint)
        self.step, self.since, self.curve = metadata["step"], metadata["since"], metadata["curve"]
        for name, tensor in self.parameters._asdict().items():
            tensor.copy_(tensors[f"parameters/{name}"])
        for trainee, sums, diverged in zip(self.trainees, metadata["sums"], metadata["diverged"], strict=True):
            trainee.sums, trainee.diverged = sums, diverged
            if diverged is not None:
                continue
            trainee.last_fired.copy_(tensors[f"{trainee.seed}/last_fired"])
            for name, parameter in trainee.sae._asdict().items():
                moments = {moment: tensors[f"{trainee.seed}/{name}/{moment}"].to(self.device) for moment in MOMENTS}
                step = torch.tensor(float(self.step), device=self.device)
                trainee.optimizer.state[parameter] = {"step": step, **moments}


def schedule(progress: float, warmup: float, decay: float) -> float:
    """Share of the peak rate at `progress` in [0, 1): a trapezium that starts above zero and ends at zero."""
    rising = (progress + 1e-3) / warmup if warmup else 1.0
    falling = (1 - progress) / decay if decay else 1.0
    return min(1.0, rising, falling)


def _mean_square(x: Float[Tensor, "token d_in"]) -> float:
    """The mean of |x|^2 over tokens."""
    return _total(torch.linalg.vecdot(x, x)) / len(x)


def _clip(gradient: Parameters, most: float) -> None:
    """Scale the gradient of one seed down to norm `most`."""
    rows = [part.reshape(len(part) if part.dim() else 1, -1) for part in gradient]
    norm = math.sqrt(sum(_total(torch.linalg.vecdot(part, part)) for part in rows))
    torch._foreach_mul_(list(gradient), min(1.0, most / norm))


def _total(values: Float[Tensor, "row"]) -> float:
    """A sum by one thread: the bits of PyTorch's depend on their number."""
    return float(values.cpu().numpy().sum(dtype=np.float64))


def _generator(recipe: Recipe, seed: int) -> torch.Generator:
    state = _random(0 if recipe.fixed_initialisation else seed, INITIALISATION).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def _random(seed: int, *purpose: int) -> np.random.SeedSequence:
    """Independent random streams from one seed."""
    return np.random.SeedSequence(seed, spawn_key=purpose)
