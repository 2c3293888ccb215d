"""JumpReLU SAEs: a learned threshold a feature, and a penalty on L0 (Rajamanoharan et al., arXiv:2407.14435, eq. 5 to 12).

    pre = W_enc (x - b_dec) + b_enc,   z = pre * H(pre - theta),   x_hat = W_dec z + b_dec,
    loss = |x - x_hat|^2 + lambda sum_i H(pre_i - theta_i),

with H the step function. Thresholds get straight-through gradients from the pre-activations within half a bandwidth of them:

    d z / d theta = -(theta / bandwidth) K((pre - theta) / bandwidth),
    d H / d theta = -(1 / bandwidth) K((pre - theta) / bandwidth),

with K the rectangle of width 1. The paper's bandwidth of 0.001 is for activations of norm 1 in a few thousand dimensions, where a
direction has a standard deviation of about 0.02. Here it is 1, and the bandwidth is in proportion. The window ends at zero: codes
are never negative.
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

BANDWIDTH = 0.05


@dataclass(frozen=True, eq=False)
class JumpReLUParameters(Parameters):
    """The weights of a JumpReLU SAE."""

    log_threshold: Float[Tensor, "*seed d_sae"]

    def scaled(self, scale: float, mean: Float[Tensor, "d_in"]) -> "JumpReLUParameters":
        return super().scaled(scale, mean)._replace(log_threshold=self.log_threshold - torch.tensor(scale).log())

    def exported(self) -> dict[str, Tensor]:
        tensors = super().exported()
        tensors["threshold"] = tensors.pop("log_threshold").exp()
        return tensors


@dataclass(frozen=True)
class JumpReLU(Variant):
    steered: ClassVar[bool] = True
    parameters: ClassVar[type[Parameters]] = JumpReLUParameters

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> JumpReLUParameters:
        sae = super().initialise(d_in, d_sae, generator)
        threshold = torch.full((d_sae,), starting_threshold(self.k, d_sae))
        return JumpReLUParameters(*sae, log_threshold=threshold.log())

    def encode(self, sae: JumpReLUParameters, x: Float[Tensor, "token d_in"]) -> Codes:
        threshold = sae.log_threshold.exp()
        codes = sparse.above(sae, x - sae.b_dec, threshold, x.dtype)
        return codes._replace(values=codes.values * (codes.values > threshold[codes.features]))

    def gradients(
        self, sae: JumpReLUParameters, gradient: JumpReLUParameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        threshold = sae.log_threshold.exp()
        near = sparse.above(sae, centred, (threshold - BANDWIDTH / 2).clamp_min(0), self.dtype)
        theta = threshold[near.features]
        fires = near.values > theta
        codes = near._replace(values=near.values * fires)
        error = codes.decode(sae.W_dec).sub_(centred)
        upstream = error * (2 / len(x))
        into_codes = codes.into(upstream, sae.W_dec)
        firings = backpropagate(sae, gradient, codes, centred, upstream, into_codes * fires, upstream.sum(0))

        window = ((near.values - theta).abs() < BANDWIDTH / 2) / BANDWIDTH
        into_threshold = -window * (theta * into_codes + self.coefficient / len(x))
        gradient.log_threshold.copy_(sparse.kernels(x).totals(firings, into_threshold * theta))
        return error, codes

    def saelens(self) -> dict:
        return {"architecture": "jumprelu"}
