"""BatchTopK SAEs: the k largest pre-activations a token fire *on average* over a batch (Bussmann et al., arXiv:2412.06410).

    z = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   loss = |x - x_hat|^2

At inference a token can't depend on its batch, so features fire above one threshold: the smallest pre-activation that fired in
a batch, on average over batches (eq. 5).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes import sparse
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import Variant, backpropagate


class BatchTopKParameters(NamedTuple):
    """The weights of a BatchTopK SAE."""

    W_enc_rows: Float[Tensor, "*seed d_sae d_in"]
    b_enc: Float[Tensor, "*seed d_sae"]
    W_dec: Float[Tensor, "*seed d_sae d_in"]
    b_dec: Float[Tensor, "*seed d_in"]
    threshold: Float[Tensor, "*seed"]
    """What pre-activations must exceed at inference; not trained, but found once training has ended."""


@dataclass(frozen=True)
class BatchTopK(Variant):
    parameters: ClassVar[type] = BatchTopKParameters

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> BatchTopKParameters:
        return BatchTopKParameters(*super().initialise(d_in, d_sae, generator), threshold=torch.zeros(()))

    def encode(self, sae, x) -> Codes:
        return sparse.above(sae, x - sae.b_dec, sae.threshold.expand_as(sae.b_enc).contiguous(), x.dtype)

    def gradients(self, sae, gradient, x):
        centred = x - sae.b_dec
        codes = sparse.top_of_batch(sae, centred, self.k, self.dtype)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        into_pre = codes.into(upstream, sae.W_dec)
        gradient.threshold.zero_()
        backpropagate(sae, gradient, codes, centred, upstream, into_pre, upstream.sum(0))
        return error, codes

    def finish(self, sae, batches) -> None:
        fired = [sparse.top_of_batch(sae, x - sae.b_dec, self.k, x.dtype).values for x in batches]
        smallest = [values.min() for values in fired if len(values)]
        sae.threshold.copy_(torch.stack(smallest).mean() if smallest else torch.tensor(0.0))
