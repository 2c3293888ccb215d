"""How work is shared among threads: seeds side by side, each with its part of PyTorch's threads, which compiled kernels follow."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from threadpoolctl import threadpool_limits
from tqdm import tqdm


def each_seed(work: Callable[[int], object], seeds: int, described: str, one_at_a_time: bool = False) -> list:
    """What `work` gives for each seed, by its position: several at a time on the CPU, with a progress bar."""
    with pool(1 if one_at_a_time else workers(seeds)) as shared:
        return list(tqdm(shared.map(work, range(seeds)), described, total=seeds, unit="seed", disable=None))


def each_pair(work: Callable[[int, int], object], seeds: int, described: str, one_at_a_time: bool = False) -> None:
    """Do `work` for each pair of seeds s < t, by their positions, with a progress bar: several at a time on the CPU."""
    pairs = [(s, t) for s in range(seeds) for t in range(s + 1, seeds)]
    with pool(1 if one_at_a_time else workers(len(pairs))) as shared:
        done = shared.map(lambda pair: work(*pair), pairs)
        for _ in tqdm(done, described, total=len(pairs), unit="pair", disable=None, leave=False):
            pass


def each_group(work: Callable[[tuple[int, ...]], Any], groups: Sequence[tuple[int, ...]], described: str) -> Iterator[Any]:
    """What `work` gives for each group of seeds, in their order: several at a time, with a progress bar.

    NumPy's products take one thread each: those of several workers would wait for one another, which takes three times as long.
    """
    with threadpool_limits(1, user_api="blas"), pool(workers(len(groups))) as shared:
        yield from tqdm(shared.map(work, groups), described, total=len(groups), unit="group", disable=None)


def in_order(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """What `work` gives for each item, in their order: several are worked on at a time, and no more than these wait to be taken."""
    with pool(workers) as shared:
        begun: deque[Future] = deque()
        for item in items:
            begun.append(shared.submit(work, item))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each of which is made in another thread while the one before it is worked on."""
    end = object()
    with pool(1) as other:
        coming = other.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = other.submit(next, items, end)
            yield item


def workers(seeds: int) -> int:
    """How many seeds, or pairs of them, to work on at a time: one a thread, which beats sharing each product among threads."""
    return max(1, min(seeds, torch.get_num_threads())) if _concurrent() else 1


def pool(workers: int) -> ThreadPoolExecutor:
    """Workers that share PyTorch's threads."""
    threads = max(1, torch.get_num_threads() // workers)
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))


@contextmanager
def single() -> Iterator[None]:
    """One thread for PyTorch's products and decompositions within.

    A math library may cut a long sum into as many pieces as it has threads (MKL does on processors with AMX), so the bits of what
    SAEs are trained on would depend on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def call(kernel, *arguments) -> None:
    """Call a numba kernel with as many threads as PyTorch uses in the calling thread."""
    threads = torch.get_num_threads()
    _launch()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    kernel(*arguments)


def _concurrent() -> bool:
    """Whether several threads may call kernels at a time: numba's plainest threading layer breaks under that."""
    _launch()
    return numba.threading_layer() != "workqueue"


@cache
def _launch() -> None:
    """Start numba's threads, which sets those of PyTorch to all cores where both share one OpenMP; put PyTorch's back."""
    threads = torch.get_num_threads()
    _nothing(np.zeros(1))
    torch.set_num_threads(threads)


@njit(parallel=True, nogil=True, cache=True)
def _nothing(values):
    for i in prange(len(values)):
        values[i] = 0
