"""Sparse autoencoders: their parameters, their codes and, one a file, the variants.

A variant is a small object with three methods: `initialise`, `encode` and `gradients` (see `topk.py`). It works on one
seed; `training.py` runs it for all seeds of a cell.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Parameters(NamedTuple):
    """The weights of one SAE, or of all seeds with a leading axis. The decoder's rows have unit length."""

    W_enc_rows: Float[Tensor, "*seed d_sae d_in"]
    """The encoder, one row a feature: `W_enc` transposed, as gradients and optimiser like it in memory."""
    b_enc: Float[Tensor, "*seed d_sae"]
    W_dec: Float[Tensor, "*seed d_sae d_in"]
    b_dec: Float[Tensor, "*seed d_in"]

    def of_seed(self, position: int) -> "Parameters":
        return Parameters(*(tensor[position] for tensor in self))


class Codes(NamedTuple):
    """What fires: for each token the values and indices of k features. A value of 0 does not fire."""

    values: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]

    def decode(self, sae: Parameters) -> Float[Tensor, "token d_in"]:
        return F.embedding_bag(self.indices, sae.W_dec, per_sample_weights=self.values, mode="sum") + sae.b_dec

    def into_codes(self, upstream: Float[Tensor, "token d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "token k"]:
        """The gradient of the values: each token's upstream gradient times the directions of the features that fire."""
        count, k = self.indices.shape
        starts = torch.arange(0, count * k, k)
        token = torch.arange(count).repeat_interleave(k)
        backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return backward(upstream, W_dec, self.indices.flatten(), starts, token, 0).view(count, k)

    def by_feature(self, d_sae: int) -> tuple[Int[Tensor, "firing"], Int[Tensor, "d_sae"], Int[Tensor, "firing"]]:
        """Firings sorted by feature: their tokens, where each feature starts, and the order in `values.flatten()`."""
        feature, order = torch.sort(self.indices.flatten(), stable=True)
        starts = torch.searchsorted(feature, torch.arange(d_sae))
        return order // self.indices.shape[1], starts, order

    def dense(self, d_sae: int) -> Float[Tensor, "token d_sae"]:
        return torch.zeros(len(self.values), d_sae).scatter_(1, self.indices, self.values)


def variant(name: str, k: int):
    """The variant called `name`, at L0 `k`."""
    from sae_stability.saes.topk import TopK

    return {"topk": TopK}[name](k)
