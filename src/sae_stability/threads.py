"""Compiled kernels run with as many threads as PyTorch does in the thread that calls them."""

from functools import cache

import numba
import numpy as np
import torch
from numba import njit, prange


def call(kernel, *arguments) -> None:
    """Call a numba kernel with as many threads as PyTorch uses in the calling thread."""
    threads = torch.get_num_threads()
    _launch()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    kernel(*arguments)


def concurrent() -> bool:
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
