"""BatchTopK SAEs: the k largest pre-activations a token fire *on average* over a batch (Bussmann et al., arXiv:2412.06410).

    z = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   loss = |x - x_hat|^2

At inference a token can't depend on its batch, so features fire above one threshold: the smallest pre-activation that fired in
a batch, on average over batches (eq. 5).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes import sparse
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import Variant, backpropagate


@dataclass(frozen=True, eq=False)
class BatchTopKParameters(Parameters):
    """The weights of a BatchTopK SAE."""

    threshold: Float[Tensor, "*seed"]
    """What pre-activations must exceed at inference; not trained, but found once training has ended."""

    def scaled(self, scale: float, mean: Float[Tensor, "d_in"]) -> "BatchTopKParameters":
        return super().scaled(scale, mean)._replace(threshold=self.threshold / scale)

    def exported(self) -> dict[str, Tensor]:
        return super().exported() | {"threshold": self.threshold.expand_as(self.b_enc)}


@dataclass(frozen=True)
class BatchTopK(Variant):
    parameters: ClassVar[type[Parameters]] = BatchTopKParameters

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> BatchTopKParameters:
        return BatchTopKParameters(*super().initialise(d_in, d_sae, generator), threshold=torch.zeros(()))

    def encode(self, sae: BatchTopKParameters, x: Float[Tensor, "token d_in"]) -> Codes:
        return sparse.above(sae, x - sae.b_dec, sae.threshold.expand_as(sae.b_enc).contiguous(), x.dtype)

    def gradients(
        self, sae: BatchTopKParameters, gradient: BatchTopKParameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        codes = sparse.top_of_batch(sae, centred, self.k, self.dtype)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        into_pre = codes.into(upstream, sae.W_dec)
        gradient.threshold.zero_()
        backpropagate(sae, gradient, codes, centred, upstream, into_pre, upstream.sum(0))
        return error, codes

    def finish(self, sae: BatchTopKParameters, batches: Iterable[Float[Tensor, "token d_in"]]) -> None:
        fired = [sparse.top_of_batch(sae, x - sae.b_dec, self.k, x.dtype).values for x in batches]
        smallest = [values.min() for values in fired if len(values)]
        sae.threshold.copy_(torch.stack(smallest).mean() if smallest else torch.tensor(0.0))

    def saelens(self) -> dict:
        return {"architecture": "jumprelu"}  # with one threshold: SAELens saves its own in the same way
