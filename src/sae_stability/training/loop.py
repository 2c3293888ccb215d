"""The training loop: some seeds of a recipe, step by step, over one block of activations after another.

A seed sets the initialisation and the order of the data, each of which can be held fixed on its own. Seeds share nothing
but the activations: a seed trained alone and the same seed trained in company give the same SAE, on a CPU bit for bit.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
from sae_stability.training.descent import descend, total
from sae_stability.training.replay import Buffers
from sae_stability.training.revival import revive
from sae_stability.training.shuffling import ROUNDS, shuffled

CURVE_POINTS = 100  # the training curve's resolution
SNAPSHOT_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the steps: decoders kept to see stability grow
DIVERGED = 100  # times the squared norm of the activations: a larger squared error is no training any more
FINISHING_BATCHES = 16  # of the last tokens, for what a variant measures once its training has ended
STRETCH = 16  # steps that a seed takes before the others get their turn
TURNS = 2  # stretches of each seed before all wait for one another, and before anybody waits for a device
POWER = 4  # bounds on dead features are powers of it, so that few kinds of steps are recorded
DEVICE_SHARE = 0.5  # of what is free on a device, that a block of activations may take
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_COST = 0.02  # of the time, that checkpoints take at most: those of many wide SAEs are large
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
    recorded: dict[int, torch.cuda.CUDAGraph | None] = field(default_factory=dict)
    """On a CUDA device, its step by the bound on dead features; None where such a step was taken, and not recorded yet."""


def encoder_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """In which training finds out what fires."""
    return fastest_dtype(device) if recipe.encoder == "fastest" else torch.float32


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
        self.checkpoint_seconds, self.save_from = checkpoint_seconds, time.monotonic() + checkpoint_seconds
        self.steps = sum(visits)
        self.records = {max(1, round(self.steps * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)}
        self.snapshots = {max(1, round(self.steps * share)) for share in SNAPSHOT_SHARES}
        self.events = self.records | self.snapshots
        self.step, self.since = 0, 0
        self.curve: list[dict] = []

        kind, dtype = variant(recipe.variant), encoder_dtype(recipe, device)
        methods = [kind(recipe.k, coefficient, dtype) for coefficient in coefficients]
        for position, (method, seed) in enumerate(zip(methods, seeds, strict=True)):
            begun = method.initialise(d_in, recipe.d_sae, generator(recipe, seed))
            if position == 0:
                self.parameters = kind.parameters(*(torch.empty(len(seeds), *tensor.shape, device=device) for tensor in begun))
            for stacked, tensor in zip(self.parameters, begun, strict=True):
                stacked[position] = tensor
        self.buffers = Buffers(STRETCH, recipe.batch, d_in, device) if device.type == "cuda" else None
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
        block = self._brought(block)
        with threads.pool(self.workers) as pool:
            while self.step < end and self.running:
                stop = min(end, self.step + TURNS * STRETCH, min(event for event in self.events if event > self.step))
                steps, running = range(self.step, stop), self.running
                advance = partial(self._advance, visit=visit, first=first, block=block)
                for trainee, of_steps in zip(running, self._in_turns(pool, running, steps, advance), strict=True):
                    self._judge(trainee, steps, torch.cat(of_steps))
                self.step = stop
                self.bar.update(self.recipe.batch * len(steps) * len(self.trainees))
                self._mark()

    def _in_turns(
        self, pool: Executor, running: list[Trainee], steps: range, advance: Callable[..., Float[Tensor, "step 3"]]
    ) -> list[list[Float[Tensor, "step 3"]]]:
        """What each seed measured, a stretch after another. A worker takes whichever seed waits: an odd one is shared."""
        most_dead = self._most_dead(steps.stop - 1)
        measured: list[list[Tensor]] = [[] for _ in running]
        waiting: deque[tuple[int, int]] = deque((position, steps.start) for position in range(len(running)))

        def work(_: int) -> None:
            while True:
                try:
                    position, start = waiting.popleft()
                except IndexError:
                    return
                stretch = range(start, min(start + STRETCH, steps.stop))
                measured[position].append(advance(running[position], most_dead[position], stretch))
                if stretch.stop < steps.stop:
                    waiting.append((position, stretch.stop))

        list(pool.map(work, range(self.workers)))
        return measured

    def _brought(self, block: Activations) -> Activations:
        """The block in the memory of the device, where that has room for it: gathering its rows there is a hundred times faster."""
        if self.device.type == "cpu" or block.data.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return block
        return block.to(self.device)

    def _mark(self) -> None:
        """Keep what is due at this step: a snapshot, a point of the curve, a checkpoint."""
        if self.step in self.snapshots and self.folder is not None:
            metadata = {"tokens": self.step * self.recipe.batch, "seeds": [trainee.seed for trainee in self.trainees]}
            save_tensors(self.folder / SNAPSHOTS / f"{self.step}.safetensors", {"W_dec": self.parameters.W_dec}, metadata)
        if self.step in self.records and self.running:
            self._record()
        if self.folder is not None and time.monotonic() > self.save_from:
            self._save(self.folder / CHECKPOINT)

    @property
    def last_visit(self) -> int:
        """The last visit that has steps: what is left at the end of a stream can be less than a batch."""
        return max(visit for visit, steps in enumerate(self.visits) if steps)

    def finish(self, block: Activations) -> Ensemble:
        """The ensemble of the seeds that did not diverge; `block` is that of `last_visit`."""
        last = self.last_visit
        for trainee in self.running:
            places = range(max(0, self.visits[last] - FINISHING_BATCHES), self.visits[last])
            trainee.method.finish(trainee.sae, self._batches(trainee, last, places, block))
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
        if self.buffers is None:
            optimizer = torch.optim.Adam(self._moved(sae), lr=self.recipe.rate, fused=True)
        else:
            optimizer = torch.optim.Adam(self._moved(sae), lr=self.buffers.rate, fused=True, capturable=True)
        return Trainee(seed, method, sae, optimizer, torch.zeros(self.recipe.d_sae, dtype=torch.int64, device=self.device))

    def _moved(self, sae: Parameters) -> list[Tensor]:
        """What the optimiser moves."""
        return list(sae)

    def _batches(self, trainee: Trainee, visit: int, places: range, block: Activations) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Some batches of a visit, in a row, by their places in it."""
        for rows in self._rows(trainee, visit, places, block).split(self.recipe.batch):
            yield block.normalised(rows).to(self.device)

    def _rows(self, trainee: Trainee, visit: int, places: range, block: Activations) -> Int[Tensor, "row"]:
        """Which tokens of a block are in some batches."""
        rows = shuffled_rows(self.recipe, trainee.seed, visit, places, len(block))
        return rows if block.data.device.type == "cpu" else rows.pin_memory().to(block.data.device, non_blocking=True)

    def _advance(
        self, trainee: Trainee, most_dead: int, steps: range, visit: int, first: int, block: Activations
    ) -> Float[Tensor, "step 3"]:
        """Take steps of one seed; what they measured, on its device. `first` is the visit's first step."""
        places = range(steps.start - first, steps.stop - first)
        rates = [self.recipe.rate * schedule(step / self.steps, self.recipe.warmup, self.recipe.decay) for step in steps]
        gradient = self.gradients.get()
        try:
            if self.buffers is not None:
                most_dead = min(self.recipe.d_sae, POWER ** math.ceil(math.log(most_dead, POWER))) if most_dead else 0
                batches = block.normalised(self._rows(trainee, visit, places, block)).to(self.device)
                one_step = partial(self._step, trainee, gradient, most_dead)
                if most_dead in trainee.recorded and trainee.recorded[most_dead] is None and trainee.method.steady:
                    trainee.recorded[most_dead] = self.buffers.record(one_step)
                return self.buffers.take(steps.start, batches, rates, one_step, trainee.recorded.setdefault(most_dead))
            measured = []
            for step, rate, x in zip(steps, rates, self._batches(trainee, visit, places, block), strict=True):
                trainee.optimizer.param_groups[0]["lr"] = rate
                measured.append(self._step(trainee, gradient, most_dead, x, step))
            return torch.stack(measured)
        finally:
            self.gradients.put(gradient)

    def _judge(self, trainee: Trainee, steps: range, measured: Float[Tensor, "step 3"]) -> None:
        """Keep what the steps of a seed measured, and stop it where it diverged.

        Steps are judged some at a time, so that a device is not waited for at each.
        """
        for step, (squared_error, squared_norm, firings) in zip(steps, measured.tolist(), strict=True):
            if not squared_error <= DIVERGED * squared_norm:  # NaN compares as false
                trainee.diverged = step
                self.bar.write(f"seed {trainee.seed} diverged at step {step} and stops; the others go on")
                return
            for place, value in enumerate((squared_error, squared_norm, firings)):
                trainee.sums[place] += value

    def _most_dead(self, step: int) -> list[int]:
        """How many features of each seed can be dead at a step or before it: those that do not fire until then."""
        return torch.stack([self._dead(trainee, step).sum() for trainee in self.running]).tolist()

    def _dead(self, trainee: Trainee, step: int | Int[Tensor, ""]) -> Bool[Tensor, "d_sae"]:
        """Features that have not fired for too long at a step."""
        return (step - trainee.last_fired) * self.recipe.batch > self.recipe.dead_after

    def _step(
        self, trainee: Trainee, gradient: Parameters, most_dead: int, x: Float[Tensor, "batch d_in"], step: int | Int[Tensor, ""]
    ) -> Float[Tensor, "3"]:
        """One step of Adam. Returns what it measured: the mean of |x_hat - x|^2, that of |x|^2, and firings a token."""
        recipe, sae = self.recipe, trainee.sae
        error, codes = trainee.method.gradients(sae, gradient, x)
        if most_dead:
            revive(sae, gradient, x - sae.b_dec, error, self._dead(trainee, step), None if self.buffers is None else most_dead)
        descend(trainee.optimizer, sae, gradient, trainee.method.unit_decoder, recipe.clip)
        fires = codes.values > 0
        trainee.last_fired.scatter_reduce_(0, codes.features, fires * step, "amax")
        return torch.stack([_mean_square(error), _mean_square(x), fires.sum().double() / len(x)])

    def _record(self) -> None:
        """Add a point to the curve, and show the mean over seeds."""
        rows = [
            {
                "seed": trainee.seed,
                "tokens": self.step * self.recipe.batch,
                "explained_variance": 1 - trainee.sums[0] / trainee.sums[1],
                "l0": trainee.sums[2] / (self.step - self.since),
                "dead": int(self._dead(trainee, self.step - 1).sum()),
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
        begun = time.monotonic()
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
        ended = time.monotonic()
        self.save_from = ended
        if self.checkpoint_seconds:  # without a pause every step is kept, as tests want it
            self.save_from += max(self.checkpoint_seconds, (ended - begun) / CHECKPOINT_COST)

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


def _mean_square(x: Float[Tensor, "token d_in"]) -> Float[Tensor, ""]:
    """The mean of |x|^2 over tokens."""
    return total(torch.linalg.vecdot(x, x)) / len(x)


def shuffled_rows(recipe: Recipe, seed: int, visit: int, places: range, tokens: int) -> Int[Tensor, "row"]:
    """Which of the tokens of a block are in some batches, by their places in a seed's visit to it."""
    keys = _random(0 if recipe.fixed_order else seed, ORDER, visit).generate_state(ROUNDS, np.uint64)
    return torch.from_numpy(shuffled(tokens, keys, places.start * recipe.batch, places.stop * recipe.batch))


def generator(recipe: Recipe, seed: int) -> torch.Generator:
    """From which the weights that a seed begins with are drawn."""
    state = _random(0 if recipe.fixed_initialisation else seed, INITIALISATION).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def _random(seed: int, *purpose: int) -> np.random.SeedSequence:
    """Independent random streams from one seed."""
    return np.random.SeedSequence(seed, spawn_key=purpose)
