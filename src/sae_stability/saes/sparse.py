"""Which features fire, and what follows from it at the price of those that do.

Only the encoder product touches every feature. It may run in bfloat16 to find out *which* features fire; what they are worth
is computed again in float32, so that weights, codes and gradients have full precision.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.saes import compiled, plain
from sae_stability.saes.parameters import Parameters

CHUNK = 512  # tokens whose pre-activations are held at a time: on a CPU they stay in its cache
SAMPLE = 64  # tokens that tell how large the largest pre-activations of a batch are


class Codes(NamedTuple):
    """What fires, as a sparse matrix: row i holds `features[starts[i]:starts[i + 1]]`. A value of 0 does not fire.

    A row is a token; a variant that reconstructs a token in parts gives it one row a part.
    """

    starts: Int[Tensor, "row+1"]
    features: Int[Tensor, "firing"]
    values: Float[Tensor, "firing"]

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "row d_in"]:
        """The directions of what fires, weighted by its values."""
        return kernels(W_dec).combine(self.values, W_dec, self.starts, self.features)

    def into(self, upstream: Float[Tensor, "row d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "firing"]:
        """The gradient of the values, where `upstream` is the gradient of what they decode to."""
        return kernels(W_dec).dots(upstream, W_dec, self.starts, self.features)

    def by_feature(self, d_sae: int) -> plain.ByFeature:
        return kernels(self.values).transposed(self.starts, self.features, d_sae)

    @classmethod
    def from_dense(cls, z: Float[Tensor, "row d_sae"]) -> "Codes":
        """The values that are not zero."""
        fires = z != 0
        return cls(F.pad(fires.sum(1).cumsum(0), (1, 0)), fires.nonzero()[:, 1], z[fires])

    def keep(self, chosen: Bool[Tensor, "firing"]) -> "Codes":
        """The chosen firings only."""
        before = F.pad(chosen.cumsum(0), (1, 0))
        return Codes(before[self.starts], self.features[chosen], self.values[chosen])

    def of(self, member: Bool[Tensor, "d_sae"]) -> "Codes":
        """The same with the values of all but some features set to zero."""
        return self._replace(values=self.values * member[self.features])

    def fired(self) -> Int[Tensor, "firing"]:
        """The feature of each firing."""
        return self.features[self.values > 0]

    def rows(self) -> Int[Tensor, "firing"]:
        """The row of each firing."""
        return plain.row_of(self.starts, len(self.features))

    def dense(self, d_sae: int) -> Float[Tensor, "row d_sae"]:
        return self.values.new_zeros(len(self.starts) - 1, d_sae).index_put_((self.rows(), self.features), self.values)


def kernels(tensor: Tensor):
    """The module whose kernels work on `tensor`."""
    if tensor.device.type == "cpu":
        return compiled
    return _of_cuda() if tensor.device.type == "cuda" else plain


@cache
def _of_cuda():
    """The Triton kernels, where PyTorch comes with Triton."""
    if find_spec("triton") is None:
        return plain
    from sae_stability.saes import cuda

    return cuda


def top(sae: Parameters, centred: Float[Tensor, "token d_in"], k: int, dtype: torch.dtype) -> Codes:
    """The k largest pre-activations of each token."""
    found = [kernels(pre).top(pre, k) for pre in _pre_activations(sae, centred, dtype)]
    starts = torch.arange(0, len(centred) * k + 1, k, device=centred.device)
    return _exact(sae, centred, starts, torch.cat(found).flatten())


def above(sae: Parameters, centred: Float[Tensor, "token d_in"], bound: Float[Tensor, "d_sae"], dtype: torch.dtype) -> Codes:
    """The pre-activations that exceed `bound`, which is zero or more; features rise within a token.

    In bfloat16 some that lie just below it are among them, so that hardly any that lie above are missed.
    """
    if dtype == torch.bfloat16:
        bound = bound * (1 - torch.finfo(dtype).eps)
    parts = [kernels(pre).above(pre, bound) for pre in _pre_activations(sae, centred, dtype)]
    return _exact(sae, centred, *_joined(parts))


def top_of_batch(sae: Parameters, centred: Float[Tensor, "token d_in"], k: int, dtype: torch.dtype) -> Codes:
    """The `len(centred) * k` largest positive pre-activations of the batch; features rise within a token.

    A sample of tokens tells where to look: a bound that a fifth more of its pre-activations exceed than are wanted. Where that
    is too high for the batch, all positive ones are looked at, so that the answer does not depend on the sample.
    """
    sample = torch.cat(list(_pre_activations(sae, centred[:: max(1, len(centred) // SAMPLE)], dtype)))
    wanted = min(sample.numel(), round(1.2 * k * len(sample)))
    guess = torch.topk(sample.flatten(), wanted).values[-1].float().clamp_min(0)
    count, none = len(centred) * k, torch.zeros_like(sae.b_enc)
    codes = above(sae, centred, none + guess, dtype)
    if (codes.values > 0).sum() < count and guess > 0:
        codes = above(sae, centred, none, dtype)
    codes = codes.keep(codes.values > 0)  # bfloat16's zero lies a rounding away
    if len(codes.values) <= count:
        return codes
    least = codes.values.kthvalue(len(codes.values) - count + 1).values
    kept, ties = codes.values > least, codes.values == least
    return codes.keep(kept | (ties & (ties.cumsum(0) <= count - kept.sum())))


def _pre_activations(sae: Parameters, centred: Float[Tensor, "token d_in"], dtype: torch.dtype) -> Iterator[Tensor]:
    """The dense product of the encoder, [token, d_sae], a chunk of tokens at a time."""
    W_enc_rows, b_enc = sae.W_enc_rows.to(dtype), sae.b_enc.to(dtype)
    for part in centred.to(dtype).split(CHUNK if centred.device.type == "cpu" else len(centred)):
        yield torch.addmm(b_enc, part, W_enc_rows.T)


def _exact(sae: Parameters, centred: Float[Tensor, "token d_in"], starts: Tensor, features: Tensor) -> Codes:
    """Codes with the pre-activations of chosen features, in float32."""
    values = kernels(centred).dots(centred, sae.W_enc_rows, starts, features)
    return Codes(starts, features, values.add_(sae.b_enc.index_select(0, features)))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Starts and features of chunks, as of one matrix."""
    counts = torch.cat([starts.diff() for starts, _ in parts])
    return F.pad(counts.cumsum(0), (1, 0)), torch.cat([features for _, features in parts])
