"""TopK SAEs: the k largest pre-activations of each token fire (Gao et al., arXiv:2406.04093).

z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,   loss = |x - x_hat|^2
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes import sparse
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import Variant, backpropagate


@dataclass(frozen=True)
class TopK(Variant):
    steady: ClassVar[bool] = True

    def encode(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Codes:
        return self._fire(sae, x - sae.b_dec, x.dtype)

    def gradients(
        self, sae: Parameters, gradient: Parameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        codes = self._fire(sae, centred, self.dtype)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        into_pre = codes.into(upstream, sae.W_dec) * (codes.values > 0)
        backpropagate(sae, gradient, codes, centred, upstream, into_pre, upstream.sum(0))
        return error, codes

    def _fire(self, sae: Parameters, centred: Float[Tensor, "token d_in"], dtype: torch.dtype) -> Codes:
        codes = sparse.top(sae, centred, self.k, dtype)
        return codes._replace(values=codes.values.relu())

    def saelens(self) -> dict:
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
