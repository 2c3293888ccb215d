"""Gated SAEs: one path decides what fires, another how strongly (Rajamanoharan et al., arXiv:2404.16014, eq. 5 to 8).

    pi = W_enc (x - b_dec) + b_enc,                                   # opens the gate where it is positive
    z  = 1[pi > 0] * ReLU(exp(r_mag) * W_enc (x - b_dec) + b_mag),    x_hat = W_dec z + b_dec,
    loss = |x - x_hat|^2 + lambda |ReLU(pi)|_1 + |x - x_hat_frozen(ReLU(pi))|^2,

where x_hat_frozen decodes with a copy of W_dec and b_dec that the loss does not train.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes import sparse
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import Variant, backpropagate, starting_threshold


@dataclass(frozen=True, eq=False)
class GatedParameters(Parameters):
    """The weights of a Gated SAE; `W_enc` and `b_enc` are the gate's."""

    r_mag: Float[Tensor, "*seed d_sae"]
    """Log of how much longer the magnitude's encoder is than the gate's."""
    b_mag: Float[Tensor, "*seed d_sae"]

    def scaled(self, scale: float, mean: Float[Tensor, "d_in"]) -> "GatedParameters":
        return super().scaled(scale, mean)._replace(b_mag=self.b_mag / scale)

    def exported(self) -> dict[str, Tensor]:
        tensors = super().exported()
        tensors["b_gate"] = tensors.pop("b_enc")
        return tensors


@dataclass(frozen=True)
class Gated(Variant):
    steered: ClassVar[bool] = True
    parameters: ClassVar[type[Parameters]] = GatedParameters

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> GatedParameters:
        sae = super().initialise(d_in, d_sae, generator)
        sae.b_enc.fill_(-starting_threshold(self.k, d_sae))
        return GatedParameters(*sae, r_mag=torch.zeros(d_sae), b_mag=sae.b_enc.clone())

    def encode(self, sae: GatedParameters, x: Float[Tensor, "token d_in"]) -> Codes:
        gate = sparse.above(sae, x - sae.b_dec, torch.zeros_like(sae.b_enc), x.dtype)
        return gate._replace(values=self._magnitudes(sae, gate)[0].relu() * (gate.values > 0))

    def gradients(
        self, sae: GatedParameters, gradient: GatedParameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        gate = sparse.above(sae, centred, torch.zeros_like(sae.b_enc), self.dtype)
        opened = gate.values > 0
        gate = gate._replace(values=gate.values.relu())
        magnitudes, scaled = self._magnitudes(sae, gate)
        codes = gate._replace(values=magnitudes.relu() * opened)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        frozen_upstream = gate.decode(sae.W_dec).sub_(centred).mul_(2 / len(x))

        into_magnitude = codes.into(upstream, sae.W_dec) * (codes.values > 0)
        into_gate = (gate.into(frozen_upstream, sae.W_dec) + self.coefficient / len(x)) * opened
        stretch = sae.r_mag.exp()[codes.features]
        into_pre = into_magnitude * stretch + into_gate
        firings = backpropagate(sae, gradient, codes, centred, upstream, into_pre, upstream.sum(0))
        totals = sparse.kernels(x).totals
        # b_enc is the gate's alone, and b_dec is frozen where the gate's reconstruction adds it.
        gradient.b_enc.copy_(totals(firings, into_gate))
        gradient.b_mag.copy_(totals(firings, into_magnitude))
        gradient.r_mag.copy_(totals(firings, into_magnitude * scaled))
        return error, codes

    def saelens(self) -> dict:
        return {"architecture": "gated"}

    def _magnitudes(self, sae: GatedParameters, gate: Codes) -> tuple[Float[Tensor, "firing"], Float[Tensor, "firing"]]:
        """Pre-activations of the magnitudes where the gate is open, with and without their bias."""
        scaled = (gate.values - sae.b_enc[gate.features]) * sae.r_mag.exp()[gate.features]
        return scaled + sae.b_mag[gate.features], scaled
