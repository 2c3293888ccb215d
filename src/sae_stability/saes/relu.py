"""ReLU SAEs: an L1 penalty, weighted by the decoder's norms, makes codes sparse.

    z = ReLU(W_enc (x - b_dec) + b_enc),   x_hat = W_dec z + b_dec,
    loss = |x - x_hat|^2 + lambda sum_i z_i |d_i|,

where d_i is feature i's direction (Conerly et al., *Update on how we train SAEs*, Transformer Circuits, April 2024). The weight
makes the loss blind to how a feature's length is shared between its code and its direction: directions need no constraint.
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
from sae_stability.saes.variant import Variant, backpropagate, starting_threshold


@dataclass(frozen=True)
class ReLU(Variant):
    steered: ClassVar[bool] = True
    unit_decoder: ClassVar[bool] = False

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> Parameters:
        sae = super().initialise(d_in, d_sae, generator)
        sae.b_enc.fill_(-starting_threshold(self.k, d_sae))
        return sae

    def encode(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Codes:
        return self._fire(sae, x - sae.b_dec, x.dtype)

    def gradients(
        self, sae: Parameters, gradient: Parameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        codes = self._fire(sae, centred, self.dtype)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        norms = sae.W_dec.norm(dim=1)
        penalty = norms * (self.coefficient / len(x))
        into_pre = (codes.into(upstream, sae.W_dec) + penalty[codes.features]) * (codes.values > 0)
        firings = backpropagate(sae, gradient, codes, centred, upstream, into_pre, upstream.sum(0))
        total = sparse.kernels(x).totals(firings, codes.values)
        gradient.W_dec.addcmul_(sae.W_dec, (total * (self.coefficient / len(x)) / norms.clamp_min(1e-12))[:, None])
        return error, codes

    def finish(self, sae: Parameters, batches: Iterable[Float[Tensor, "token d_in"]]) -> None:
        """Move each direction's length into its code: what the SAE computes stays the same."""
        norms = sae.W_dec.norm(dim=1).clamp_min(1e-12)
        sae.W_dec.div_(norms[:, None])
        sae.W_enc_rows.mul_(norms[:, None])
        sae.b_enc.mul_(norms)

    def _fire(self, sae: Parameters, centred: Float[Tensor, "token d_in"], dtype: torch.dtype) -> Codes:
        codes = sparse.above(sae, centred, torch.zeros_like(sae.b_enc), dtype)
        return codes._replace(values=codes.values.relu())

    def saelens(self) -> dict:
        return {"architecture": "standard"}
