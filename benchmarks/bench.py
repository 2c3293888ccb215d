"""Measures training against SAELens, dictionary_learning and sparsify, then matching, all in one run (`make bench`).

Contestants take turns, so that a noisy machine slows them all. Ours fetch their batches from the activations, each seed in an
order of its own; the peers get ready-made batches. Times are per step and seed. A peer is compared in its fastest mode: float32, or
bfloat16 where the machine multiplies it; SAELens alone or with two SAEs together. What is timed are early steps, before any library
revives dead features.
"""

import argparse
import importlib.metadata
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import peers
import psutil
import torch
from bench_matching import compare_matching, raised_peak
from data import TOKENS, open_activations
from tqdm import tqdm

from sae_stability import places
from sae_stability.experiments.quality import on_target
from sae_stability.files import read_json, write_json
from sae_stability.language.activations import Activations
from sae_stability.saes import fastest_dtype
from sae_stability.store import git_commit
from sae_stability.study import Recipe, Variants
from sae_stability.training import prepare, train
from sae_stability.training.loop import Training
from sae_stability.training.shuffling import ROUNDS, shuffled
from sae_stability.training.steering import search

LIBRARIES = ("saelens", "dictionary_learning", "sparsify")
PARTS = ("times", "quality", "memory", "matching")
VERSIONS = ("torch", "numba", "sae-lens", "dictionary-learning", "eai-sparsify")
STEPS = 4  # of each of our seeds in a round
THEIR_STEPS = 2  # which are longer
SETTLING = 25  # steps before penalties are timed: their codes start four times as dense as they stay
RETURNED, GIVING_BACK = "freed memory returned", "MALLOC_MMAP_THRESHOLD_"
"""By this variable glibc gives back at once what is freed of blocks from a size on, and the next step pays for fresh pages."""
COEFFICIENTS = {"relu": 1.5, "gated": 2.5, "jumprelu": 0.5}  # near L0 = 32 at the timed shape


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int
    batch: int
    rate: float = 2e-3

    def recipe(self, name: str, tokens: int, **keys) -> Recipe:
        size = {"d_sae": self.d_sae, "k": self.k, "batch": self.batch, "rate": self.rate, "tokens": tokens}
        return Recipe(model="none", hook_name="blocks.0.hook_resid_post", variant=name, **size, **keys)


TIMED = {"cpu": Shape(256, 4096, 32, 4096), "cuda": Shape(768, 24_576, 32, 4096)}
COMPARED = Shape(256, 512, 16, 512)  # the shape at which qualities are compared
SEEDS = range(4)  # of that comparison


def drawn_activations(d_in: int, tokens: int) -> Activations:
    """Sums of a few of 4 d_in random directions: for shapes that no embedded model has."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    fires = torch.rand(tokens, len(directions), generator=generator) < 0.02
    return Activations.of((fires * torch.rand(tokens, len(directions), generator=generator)) @ directions)


class Ours:
    """Our training, a few steps at a time."""

    def __init__(self, shape: Shape, name: str, seeds: int, data: Activations, device: torch.device, **keys):
        recipe = shape.recipe(name, len(data), coefficient=COEFFICIENTS.get(name), **keys)
        job = prepare(recipe, data, list(range(seeds)), device=device.type)
        visits = [SETTLING if name in COEFFICIENTS else 2, *[STEPS] * 200]
        self.training = Training(
            recipe, job.seeds, job.coefficients, visits, data.d_in, None, device, np.inf, tqdm(disable=True)
        )  # fmt: skip
        self.data, self.seeds, self.visit = data.to(device), seeds, 0  # where training brings a block once for all its steps
        self.step()

    def step(self) -> int:
        """Take the next visit's steps; how many seed-steps they were."""
        self.training.consume(self.visit, self.data)
        self.visit += 1
        return STEPS * self.seeds


class Theirs:
    """A peer's training, a few steps at a time on ready-made batches."""

    def __init__(
        self, library: str, shape: Shape, name: str, mode: str, batches: list[torch.Tensor], device: torch.device, seeds=1
    ):
        given = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "batch": shape.batch, "steps": 10_000, "rate": shape.rate}
        given |= {"mode": mode, "coefficient": COEFFICIENTS.get(name), "device": device.type}
        if seeds == 1:
            self.trainee = peers.start(library, name, **given, seed=0)
        else:
            self.trainee = peers.start_many(library, name, **given, seeds=list(range(seeds)))
        self.batches, self.seeds = batches, seeds
        self.trainee.step(batches[0])  # some libraries do more in their first step

    def step(self) -> int:
        count = max(1, THEIR_STEPS // self.seeds)
        for x in self.batches[:count]:
            self.trainee.step(x)
        return count * self.seeds


def in_turns(
    contestants: dict[str, Callable[[], int]], rounds: int, device: torch.device, described: str
) -> dict[str, list[float]]:
    """Seconds per seed-step of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in tqdm(range(rounds), described, disable=None):
        for name, step in contestants.items():
            _synchronise(device)
            started = time.perf_counter()
            count = step()
            _synchronise(device)
            seconds[name].append((time.perf_counter() - started) / count)
    return seconds


def floor(shape: Shape, data: Activations, device: torch.device) -> dict[str, Callable[[], int]]:
    """What a step can't do without: an encoder product, and a pass of Adam over parameters and moments."""
    x = data.normalised(slice(0, shape.batch)).to(device)
    weights = [torch.randn(shape.d_sae, shape.d_in, device=device) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, fused=True)

    def product(dtype: torch.dtype) -> Callable[[], int]:
        rows, W, bias = x.to(dtype), weights[0].to(dtype), torch.zeros(shape.d_sae, dtype=dtype, device=device)
        out = torch.empty(shape.batch, shape.d_sae, dtype=dtype, device=device)
        return lambda: len([torch.addmm(bias, rows, W.T, out=out) for _ in range(STEPS)])

    return {
        "product float32": product(torch.float32),
        f"product {_name(fastest_dtype(device))}": product(fastest_dtype(device)),
        "adam": lambda: len([optimizer.step() for _ in range(STEPS)]),
    }


def modes(library: str, device: torch.device) -> list[str]:
    """The modes in which a peer is timed. Where a processor lacks bfloat16, its product alone outlasts whole steps in float32."""
    found = [_name(dtype) for dtype in dict.fromkeys((torch.float32, fastest_dtype(device)))]
    return found[-1:] if library == "sparsify" and device.type == "cuda" else found  # its kernels there want bfloat16


def bfloat16_over_float32(device: torch.device) -> float:
    """How many times as long a product takes in bfloat16, the best of several."""
    seconds = {dtype: math.inf for dtype in (torch.float32, torch.bfloat16)}
    for dtype in seconds:
        x, W = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
        for _ in range(5):
            _synchronise(device)
            started = time.perf_counter()
            x @ W
            _synchronise(device)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return round(seconds[torch.bfloat16] / seconds[torch.float32], 2)


def time_variant(name: str, shape: Shape, data: Activations, rounds: int, device: torch.device) -> list[dict]:
    """Rows of the table of times for one variant."""
    batches = [data.normalised(slice(i * shape.batch, (i + 1) * shape.batch)).to(device) for i in range(STEPS)]
    contestants: dict[str, object] = {_ours(count): Ours(shape, name, count, data, device) for count in (8, 4, 1)}
    if fastest_dtype(device) != torch.float32:
        contestants["ours, 8 seeds, float32"] = Ours(shape, name, 8, data, device, encoder="float32")
    for library in LIBRARIES:
        if name in peers.VARIANTS[library]:
            for mode in modes(library, device):
                contestants[f"{library}, {mode}"] = Theirs(library, shape, name, mode, batches, device)
    if name == "topk":
        for mode in modes("saelens", device):
            contestants[f"saelens, {mode}, 2 seeds together"] = Theirs("saelens", shape, name, mode, batches, device, seeds=2)
    steps = {**{key: contestant.step for key, contestant in contestants.items()}, **floor(shape, data, device)}
    seconds = in_turns(steps, rounds, device, f"times, {name}")
    return [
        {
            "variant": name,
            "contestant": key,
            "ms": _ms(times),
            "tokens_per_second": round(shape.batch / statistics.median(times)),
            "times_ours": round(float(np.median(np.array(times) / np.array(seconds["ours, 8 seeds"]))), 2),
        }
        for key, times in seconds.items()
    ]


def compare_quality(name: str, train_on: Activations, held_out: Activations) -> list[dict]:
    """L0 and explained variance on held-out tokens after equal tokens, at the same batch, rate and target L0."""
    shape = COMPARED
    recipe = shape.recipe(name, TOKENS)
    rows = [_ours_at(name, recipe, "float32", train_on, held_out)]
    coefficient = rows[0]["coefficient"]
    rows.append(_ours_at(name, recipe.model_copy(update={"coefficient": coefficient}), "fastest", train_on, held_out))
    if coefficient is not None:  # SAELens's penalties are weighed by the same rule as ours
        coefficient, _, _ = search(
            lambda around: [_saelens(name, train_on, held_out, PILOT, penalty)[0] for penalty in around], coefficient, shape.k
        )
    measured = [_saelens(name, train_on, held_out, seed, coefficient) for seed in tqdm(SEEDS, f"quality, {name}", disable=None)]
    rows.append(_summary(name, "saelens", measured, coefficient))
    reached = rows[-1]["l0"]
    if not on_target(reached, shape.k):  # then ours go where it went: only equal L0 compare
        rows.append(_ours_at(name, recipe.model_copy(update={"k": round(reached)}), "fastest", train_on, held_out))
    return rows


def _ours_at(name: str, recipe: Recipe, encoder: str, train_on: Activations, held_out: Activations) -> dict:
    """The quality of ours at the recipe's L0, its penalty steered where it has one."""
    coefficient = recipe.coefficient or prepare(recipe, train_on, [0]).coefficients[0] or None
    ensemble = train(recipe.model_copy(update={"coefficient": coefficient, "encoder": encoder}), train_on, list(SEEDS))
    x = held_out.data.float()
    measured = [_quality(ensemble.of(seed).encode(x)[0], ensemble.reconstruct(seed, x), x) for seed in SEEDS]
    return _summary(name, f"ours, {encoder}" + (f", L0 {recipe.k}" if recipe.k != COMPARED.k else ""), measured, coefficient)


def by_precision(quality: list[dict]) -> list[dict]:
    """Explained variance of ours by the type in which it looks for the features that fire: one row a variant."""
    found = {(row["variant"], row["contestant"]): row["explained_variance"] for row in quality}
    names = dict.fromkeys(row["variant"] for row in quality)
    return [{"variant": name, "float32": found[name, "ours, float32"], "bfloat16": found[name, "ours, fastest"]} for name in names]


PILOT = 1000  # the seed that steers SAELens's penalties


def _saelens(name: str, train_on: Activations, held_out: Activations, seed: int, coefficient: float | None) -> tuple[float, float]:
    shape, steps = COMPARED, TOKENS // COMPARED.batch
    size = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "batch": shape.batch, "steps": steps, "rate": shape.rate}
    trainee = peers.start("saelens", name, **size, seed=seed, mode="float32", coefficient=coefficient)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    for step in range(steps):
        rows = shuffled(TOKENS, keys, step * shape.batch, (step + 1) * shape.batch)
        trainee.step(train_on.normalised(torch.from_numpy(rows)))
    x = (held_out.data.float() - train_on.mean) * train_on.scale
    with torch.no_grad():
        return _quality(trainee.encode(x), trainee.reconstruct(x), x)


def _quality(z: torch.Tensor, x_hat: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """L0 and explained variance."""
    return (z > 0).sum(1).float().mean().item(), 1 - ((x_hat - x).square().sum() / (x - x.mean(0)).square().sum()).item()


def _summary(name: str, contestant: str, measured: list[tuple[float, float]], coefficient: float | None) -> dict:
    l0, explained = (np.array(values) for values in zip(*measured, strict=True))
    error = explained.std(ddof=1) / np.sqrt(len(explained))
    return {
        "variant": name,
        "contestant": contestant,
        "l0": round(float(l0.mean()), 3),
        "explained_variance": round(float(explained.mean()), 5),
        "standard_error": round(float(error), 5),
        "coefficient": coefficient,
    }


def peak_memory(contestant: str, shape: Shape) -> int:
    """Bytes by which training raises this process's peak of memory, after a rehearsal that compiles what is compiled."""
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    data = Activations.of(torch.randn(4 * shape.batch, shape.d_in, generator=generator))
    batches = [data.normalised(slice(0, shape.batch)).clone() for _ in range(2)]
    count = _seeds(contestant)

    def some_steps(of: Shape) -> None:
        if contestant.startswith("ours"):
            Ours(of, "topk", count, data, device).step()
        else:
            library, mode = contestant.split(", ")[:2]
            Theirs(library, of, "topk", mode, [x[: of.batch] for x in batches], device).step()

    some_steps(Shape(shape.d_in, 64, 4, 64))
    return raised_peak(lambda: some_steps(shape))


def compare_memory(shape: Shape) -> list[dict]:
    """Peak memory of training at a shape, in megabytes, beside the bound: parameters, Adam's moments and a batch for each seed."""
    rows, plain = [], [*(_ours(count) for count in (1, 4, 8)), *(f"{library}, float32" for library in LIBRARIES)]
    for contestant in (*plain, *(f"{name}, {RETURNED}" for name in plain)):
        os.environ |= {GIVING_BACK: "1000000"} if contestant.endswith(RETURNED) else {}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(peak_memory, (contestant, shape))
        os.environ.pop(GIVING_BACK, None)
        seeds = _seeds(contestant)
        parameters = 2 * shape.d_in * shape.d_sae + shape.d_sae + shape.d_in
        bound = 4 * seeds * (3 * parameters + shape.batch * shape.d_in)
        rows.append({"contestant": contestant, "megabytes": round(measured / 1e6), "bound_megabytes": round(bound / 1e6)})
    return rows


def _ours(seeds: int) -> str:
    return f"ours, {seeds} seed{'s' if seeds > 1 else ''}"


def _seeds(contestant: str) -> int:
    return int(contestant.split(", ")[1].split()[0]) if contestant.startswith("ours") else 1


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ms(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: list[dict]) -> str:
    """Rows as aligned text."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant gets")
    parser.add_argument("--variants", nargs="*", default=list(Variants.__args__), help="by default all")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure; the rest of --out stays as it is"
    )
    parser.add_argument("--out", type=Path, default=places.root() / "benchmarks" / "results.json")
    arguments = parser.parse_args()
    if "times" in arguments.parts and "topk" not in arguments.variants:
        parser.error("--variants: topk must be among them, since the ratios are its")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TIMED[device.type]
    if {"times", "quality"} & set(arguments.parts):
        train_on, held_out = open_activations("train"), open_activations("evaluation")

    before = read_json(arguments.out) if arguments.out.exists() else {}
    fresh = {"commits": {}, "processors": {}} | {key: before[key] for key in ("bfloat16",) if key in before}
    results = before if before and set(arguments.parts) < set(PARTS) else fresh
    commit = git_commit()  # before what is measured changes this checkout
    where = {"machine": machine(device), "versions": versions()}  # which fails at once where peers are missing
    for part in arguments.parts:  # each is kept as soon as it is measured
        if part == "times":
            data = train_on if shape.d_in == train_on.d_in else drawn_activations(shape.d_in, 50 * shape.batch)
            times = [row for name in arguments.variants for row in time_variant(name, shape, data, arguments.rounds, device)]
            results |= {"shape": asdict(shape), "times": times, **ratios_and_floor(times, device)}
            print(table(times), "ratios", results["ratios"], "floor", results["floor"], sep="\n")
        elif part == "quality":
            quality = [row for name in arguments.variants for row in compare_quality(name, train_on, held_out)]
            others = [row for row in results.get("quality", []) if row["variant"] not in arguments.variants]
            results["quality"] = sorted(others + quality, key=lambda row: list(Variants.__args__).index(row["variant"]))
            results["quality_shape"] = {**asdict(COMPARED), "tokens": TOKENS, "seeds": len(SEEDS)}
            if fastest_dtype(device) == torch.bfloat16:  # a processor without it has nothing to say, and leaves this as it is
                results["bfloat16"] = {"commit": commit, "processor": _processor(), "quality": by_precision(quality)}
            print(table(quality))
        elif part == "memory":
            results["memory"] = compare_memory(TIMED["cpu"])
            print(table(results["memory"]))
        else:
            results["matching"] = compare_matching()
            print(results["matching"])
        results["commits"][part], results["processors"][part] = commit, _processor()
        results |= {**where, "commit": commit, "date": time.strftime("%Y-%m-%d")}
        write_json(arguments.out, results)


def machine(device: torch.device) -> dict:
    """What it was measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "bfloat16": fastest_dtype(device) == torch.bfloat16,
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONS}}


def ratios_and_floor(times: list[dict], device: torch.device) -> dict:
    """The peers' fastest modes over ours for TopK, and how far ours is from what a step can't do without."""
    topk = {row["contestant"]: row for row in times if row["variant"] == "topk"}
    fastest = f"product {_name(fastest_dtype(device))}"
    least = topk[fastest]["ms"] + topk["adam"]["ms"]
    ratios = {library: min(row["times_ours"] for key, row in topk.items() if key.startswith(library)) for library in LIBRARIES}
    floor = {
        "ms": least,
        "product_ms": topk[fastest]["ms"],
        "product_float32_ms": topk["product float32"]["ms"],
        "adam_ms": topk["adam"]["ms"],
        "bfloat16_over_float32": bfloat16_over_float32(device),
        "ours_over_floor": round(topk["ours, 8 seeds"]["ms"] / least, 2),
        "share": round(least / topk["ours, 8 seeds"]["ms"], 3),
    }
    return {"ratios": ratios, "floor": floor}


def _processor() -> str:
    """The processor's name, and the instructions that decide how fast it multiplies."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return ", ".join([name, *(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags)])


if __name__ == "__main__":
    main()
