"""Matching pursuit (Mallat & Zhang 1993, doi:10.1109/78.258082): one encoder for every dictionary, whatever trained it.

An SAE's own encoder was trained with all its features in place. Whether others can do the work of some is asked of one that isn't.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.saes.sparse import kernels

ROWS = 4096  # tokens encoded at a time: their products with all directions are kept
NEVER = -1e30  # the product with a direction that may not be taken: finite, since kernels are compiled for finite numbers


def matching_pursuit(
    x: Float[Tensor, "token d_in"], directions: Float[Tensor, "d_sae d_in"], k: int, without: Bool[Tensor, "set d_sae"]
) -> list[tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]]:
    """Which of some directions of unit length each token takes in k steps, and how much of it, once without each of some sets of
    them; none where the value is zero. Features are numbered among those that are left.

    Each step takes the direction along which most of the residual lies, and that part away. As in SAEs no code is negative: where
    every direction points away from the residual a token is done. A direction may be taken again, so at most k fire. The decoder's
    offset is to be taken from `x` before. All is computed on the device of `directions`, where `x` need not lie, and products with
    `x` once for all sets. Memory is that of the cosines of all directions with one another, d_sae^2 in float32, and of the codes.
    """
    gram, pursue, without = directions @ directions.T, kernels(directions).pursue, without.to(directions.device)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in without]
    for rows in x.split(ROWS):
        along = rows.to(directions.device) @ directions.T
        for parts, gone in zip(found, without, strict=True):
            parts.append(pursue(along.masked_fill(gone, NEVER), gram, k))
    numbers = F.pad((~without).cumsum(1).sub(1).clamp_min(0), (0, 1))  # one more: of no directions, none is taken
    codes = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in found)
    return [(number[features], values) for number, (features, values) in zip(numbers, codes, strict=True)]
