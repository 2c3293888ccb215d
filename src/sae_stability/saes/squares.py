"""Squared errors without each of many sets of features, as a numba kernel.

What a set writes on a token stays in the processor's cache. As matrices, one a set, it would go through memory several times, and
that is what most of the time went by with.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from numba import njit, prange
from torch import Tensor

from sae_stability import threads
from sae_stability.saes.compiled import REASSOCIATED
from sae_stability.saes.sparse import Codes

BLOCKS = 8  # into which the tokens of a thread are cut


def squared_errors(
    target: Float[Tensor, "token d_in"],
    error: Float[Tensor, "token d_in"],
    codes: Codes,
    W_dec: Float[Tensor, "d_sae d_in"],
    members: Bool[Tensor, "set d_sae"],
) -> tuple[Float[Tensor, "set token"], Float[Tensor, "set token"]]:
    """For each set, the squares of each token's `error` with what the set writes added to it, and of `target` less what it writes.

    Every token belongs to one thread, so that results do not depend on the number of threads. Raises `ValueError` for shapes that
    do not fit, and for codes that are none of these tokens and features: the kernel indexes without bounds checks.
    """
    starts, features, values = codes
    if not (target.shape == error.shape and target.shape[1] == W_dec.shape[1] and members.shape[1] == len(W_dec)):
        shapes = ", ".join(str(list(each.shape)) for each in (target, error, W_dec, members))
        raise ValueError(f"target, error, directions and members do not fit one another: {shapes}")
    matrix = len(starts) == len(target) + 1 and starts[0] == 0 and starts[-1] == len(features) == len(values)
    inside = bool((starts.diff() >= 0).all()) and bool(((features >= 0) & (features < len(W_dec))).all())
    if not (matrix and inside):
        raise ValueError(f"codes: {len(features)} firings are no matrix of {len(target)} tokens and {len(W_dec)} features")
    added, left = (torch.empty(len(members), len(target)) for _ in range(2))
    read = (each.contiguous().numpy() for each in (target, error, starts, features, values, W_dec, members))
    threads.call(_squared_errors, *read, BLOCKS * torch.get_num_threads(), added.numpy(), left.numpy())
    return added, left


@njit(parallel=True, nogil=True, cache=True, fastmath=REASSOCIATED)
def _squared_errors(target, error, starts, features, values, W_dec, members, blocks, added, left):
    tokens, d_in = target.shape
    for block in prange(blocks):
        written = np.empty(d_in, np.float32)
        for token in range(block * tokens // blocks, (block + 1) * tokens // blocks):
            wanted, missed = target[token], error[token]
            for of in range(len(members)):
                written[:] = 0
                for p in range(starts[token], starts[token + 1]):
                    if members[of, features[p]]:
                        value, direction = values[p], W_dec[features[p]]
                        for c in range(d_in):
                            written[c] += value * direction[c]
                plus, less = np.float32(0), np.float32(0)
                for c in range(d_in):
                    plus += (missed[c] + written[c]) ** 2
                    less += (wanted[c] - written[c]) ** 2
                added[of, token], left[of, token] = plus, less
