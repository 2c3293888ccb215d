"""Measures matching: all pairs of many dictionaries against the matrix products alone, a plain loop, pooling them, and one-to-one
assignment."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from sae_stability.matching import assign, stability
from sae_stability.matching.pairs import CHUNK
from sae_stability.pooling import pool
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE


@dataclass(frozen=True)
class Dictionaries:
    seeds: int
    d_sae: int
    d_in: int

    def draw(self) -> torch.Tensor:
        """Unit directions [seed, d_sae, d_in]: half of each seed's are common to all, up to noise and order."""
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(self.seeds, self.d_sae, self.d_in, generator=generator)
        half = self.d_sae // 2
        for s in range(1, self.seeds):
            W[s, torch.randperm(self.d_sae, generator=generator)[:half]] = W[0, :half] + 0.5 * W[s, :half]
        for directions in W:  # in place: they are large
            F.normalize(directions, dim=1, out=directions)
        return W


ALL_PAIRS = Dictionaries(8, 32_768, 768)
PAIRED = Dictionaries(2, 8192, 768)  # SciPy's dense assignment takes time in proportion to the cube of the width


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _products(W: torch.Tensor) -> None:
    """The matrix products of the first seed's pairs, and nothing else."""
    for other in W[1:]:
        for start in range(0, W.shape[1], CHUNK):
            W[0, start : start + CHUNK] @ other.T


def _plain(A: torch.Tensor, B: torch.Tensor) -> None:
    """One pair as it is usually written: the whole matrix of cosines, then its best in either direction."""
    cosines = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T
    cosines.max(1)
    cosines.max(0)


def raised_peak(call: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's memory at the highest."""
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    call()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def matched(W: torch.Tensor) -> None:
    stability(W)


def pooled(W: torch.Tensor) -> None:
    """One SAE of the directions of several."""
    nothing, bias = torch.zeros(()).expand(W.shape[1:]), torch.zeros(())
    parameters = (Parameters(nothing, bias.expand(len(rows)), rows, torch.zeros(rows.shape[1])) for rows in W)
    pool([SAE(None, None, each) for each in parameters])


def alone(shape: Dictionaries, work: Callable[[torch.Tensor], None]) -> tuple[float, int]:
    """Seconds of ours, and the bytes by which its process stands above its start at the highest, dictionaries included."""
    work(torch.randn(2, 64, 8))  # compiles
    seconds = []

    def measured() -> None:
        W = shape.draw()
        seconds.append(_seconds(lambda: work(W)))

    peak = raised_peak(measured)
    return seconds[0], peak


def compare_matching(shape: Dictionaries = ALL_PAIRS, paired: Dictionaries = PAIRED) -> dict:
    """Seconds and memory; everything on the same directions, in turn. Ours compares all pairs, the others some."""
    pairs = shape.seeds * (shape.seeds - 1) // 2
    taken = {}
    for work in (matched, pooled):
        with multiprocessing.get_context("spawn").Pool(1) as process:  # one of its own, for its memory
            taken[work] = process.apply(alone, (shape, work))
    W = shape.draw()
    seconds = {
        "products": pairs / (shape.seeds - 1) * _seconds(lambda: _products(W)),
        "ours": taken[matched][0],
        "pooling": taken[pooled][0],
        "plain loop": pairs * _seconds(lambda: _plain(W[0], W[1])),
    }
    del W
    A, B = paired.draw()
    exact = []
    dense = _seconds(lambda: exact.append(linear_sum_assignment((A @ B.T).numpy(), maximize=True)))
    found = []
    ours = _seconds(lambda: found.append(assign(A, B)))
    return {
        "shape": {**asdict(shape), "pairs": pairs},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ours_over_products": round(seconds["ours"] / seconds["products"], 2),
        "peak_gb": round(taken[matched][1] / 1e9, 2),
        "pooling_peak_gb": round(taken[pooled][1] / 1e9, 2),
        "assignment": {
            **asdict(paired),
            "dense_seconds": round(dense, 1),
            "ours_seconds": round(ours, 1),
            "dense_mcc": round(float((A @ B.T).numpy()[exact[0]].mean()), 6),
            "ours_mcc": round(found[0].mean, 6),
            "bound": round(found[0].bound, 6),
        },
    }
