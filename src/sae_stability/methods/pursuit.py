"""Matching pursuit (Mallat & Zhang 1993, doi:10.1109/78.258082): one encoder for every dictionary, whatever trained it.

An SAE's own encoder was trained with all its features in place. Whether others can do the work of some is asked of one that isn't.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability.saes.sparse import kernels

ROWS = 4096  # tokens encoded at a time: their products with all directions are kept


def matching_pursuit(
    x: Float[Tensor, "token d_in"], directions: Float[Tensor, "d_sae d_in"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Which of some directions of unit length each token takes in k steps, and how much of it; none where the value is zero.

    Each step takes the direction along which most of the residual lies, and that part away. As in SAEs no code is negative: where
    every direction points away from the residual a token is done. A direction may be taken again, so at most k fire. The decoder's
    offset is to be taken from `x` before. All is computed on the device of `directions`, where `x` need not lie. Memory is that of
    the cosines of all directions with one another, d_sae^2 in float32.
    """
    gram, pursue = directions @ directions.T, kernels(directions).pursue
    parts = [pursue(rows.to(directions.device) @ directions.T, gram, k) for rows in x.split(ROWS)]
    features, values = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(values)
