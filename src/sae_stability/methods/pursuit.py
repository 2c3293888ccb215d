"""Matching pursuit (Mallat & Zhang 1993, doi:10.1109/78.258082): one encoder for every dictionary, whatever trained it.

An SAE's own encoder was trained with all its features in place. Whether others can do the work of some is asked of one that isn't.
"""

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from numba import njit, prange
from scipy import sparse
from torch import Tensor

from sae_stability import threads

ROWS = 4096  # tokens encoded at a time: their products with all directions are kept
BLOCK = 32  # directions whose largest product is found together, in registers


def matching_pursuit(x: Float[Tensor, "token d_in"], directions: Float[Tensor, "d_sae d_in"], k: int) -> sparse.csr_array:
    """Codes [token, d_sae] of tokens in k steps each, over directions of unit length.

    Each step takes the direction along which most of the residual lies, and that part away. As in SAEs no code is negative: where
    every direction points away from the residual a token is done. A direction may be taken again, so at most k fire. The decoder's
    offset is to be taken from `x` before. Memory is that of the cosines of all directions with one another, d_sae^2 in float32.
    """
    count = len(directions)
    features, values = np.zeros((len(x), k), dtype=np.int64), np.zeros((len(x), k), dtype=np.float32)
    directions = F.pad(directions, (0, 0, 0, -count % BLOCK))  # by directions of length 0, which are never taken
    gram = (directions @ directions.T).numpy()
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        threads.call(_pursue, (x[rows] @ directions.T).numpy(), gram, features[rows], values[rows])
    taken = values > 0
    at = (taken.nonzero()[0], features[taken])
    return sparse.coo_array((values[taken], at), shape=(len(x), count)).tocsr()  # adds up what was taken again


@njit(parallel=True, nogil=True, cache=True, fastmath=True)
def _pursue(along, gram, features, values):
    """`along`: the inner product of each residual with each direction, kept up to date. Whole blocks of directions."""
    for token in prange(len(along)):
        left = along[token]
        for step in range(features.shape[1]):
            most, block = np.float32(0), 0
            for start in range(0, len(left), BLOCK):
                here = left[start]
                for j in range(start, start + BLOCK):
                    here = left[j] if left[j] > here else here
                if here > most:
                    most, block = here, start
            if most <= 0:
                break
            best = block
            while left[best] != most:
                best += 1
            features[token, step], values[token, step] = best, most
            row = gram[best]
            for j in range(len(left)):
                left[j] -= most * row[j]
