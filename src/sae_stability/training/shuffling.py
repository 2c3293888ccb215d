"""Random orders that need no memory: any part of a permutation can be asked for by itself.

A Feistel network over the smallest power of four that holds all places is a permutation whatever its round function is; places
that it sends outside go through it again until they come back (Black & Rogaway, *Ciphers with arbitrary finite domains*, 2002).
"""

import numpy as np
from jaxtyping import Int
from numba import njit

ROUNDS = 6


def shuffled(count: int, keys: Int[np.ndarray, "round"], start: int, stop: int) -> Int[np.ndarray, "place"]:
    """Places `start` to `stop` of a permutation of `range(count)`; `keys` are `ROUNDS` random 64-bit integers."""
    return _shuffled(count, keys, start, stop)


@njit(nogil=True, cache=True)
def _shuffled(count, keys, start, stop):
    bits = np.uint64(1)
    while np.uint64(1) << (np.uint64(2) * bits) < np.uint64(count):
        bits += np.uint64(1)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    out = np.empty(stop - start, np.int64)
    for i in range(start, stop):
        place = np.uint64(i)
        while True:
            left, right = place >> bits, place & mask
            for key in keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            place = (left << bits) | right
            if place < np.uint64(count):
                break
        out[i - start] = place
    return out


@njit(cache=True)
def _mixed(x):
    """SplitMix64's finaliser: every bit of the input moves every bit of the output (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
