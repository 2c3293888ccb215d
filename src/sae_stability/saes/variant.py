"""What a variant is: the interface that training, evaluation and the tables know."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.plain import ByFeature
from sae_stability.saes.sparse import Codes, kernels


@dataclass(frozen=True)
class Variant(ABC):
    """One SAE objective on one seed. A variant overrides `encode` and `gradients`, and what else differs.

    Activations come normalised: mean zero, average norm sqrt(d_in).
    """

    k: int
    """The L0 it is brought to."""
    coefficient: float = 0.0
    """Weight of the sparsity penalty, where there is one."""
    dtype: torch.dtype = torch.float32
    """In which training looks for the features that fire; everything else is float32."""

    steered: ClassVar[bool] = False
    """Whether L0 follows from the coefficient, which must then be found."""
    steady: ClassVar[bool] = False
    """Whether `gradients` does work of the same shapes whatever fires, so that a device can replay it."""
    unit_decoder: ClassVar[bool] = True
    """Whether training keeps the decoder's rows at unit length."""
    parameters: ClassVar[type[Parameters]] = Parameters

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> Parameters:
        """Random unit directions; the encoder starts as the decoder's transpose (tied start)."""
        W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        return Parameters(W_enc_rows=W_dec.clone(), b_enc=torch.zeros(d_sae), W_dec=W_dec, b_dec=torch.zeros(d_in))

    @abstractmethod
    def encode(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Codes:
        """The codes at inference, in float32."""

    @abstractmethod
    def gradients(
        self, sae: Parameters, gradient: Parameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        """Write the gradient of the loss, a mean over tokens, into `gradient`; return x_hat - x and the codes."""

    def finish(self, sae: Parameters, batches: Iterable[Float[Tensor, "token d_in"]]) -> None:  # noqa: B027, most need nothing
        """What is left to do in place once training has ended, with some batches of its tokens."""

    def saelens(self) -> dict:
        """What SAELens's config says of this variant: the architecture that gives the same codes, and its own fields.

        Raises `UserError` where SAELens has none.
        """
        raise UserError(f"format: SAELens has no architecture for {type(self).__name__}; keep it in our own ensemble files")


def starting_threshold(k: int, d_sae: int) -> float:
    """The pre-activation that about 4 k features of a token exceed at the start.

    A direction of normalised activations has variance 1 on average. Where a penalty makes codes sparse, this saves the steps
    in which half of all features fire.
    """
    return max(0.1, NormalDist().inv_cdf(1 - min(0.5, 4 * k / d_sae)))


def backpropagate(
    sae: Parameters,
    gradient: Parameters,
    codes: Codes,
    centred: Float[Tensor, "token d_in"],
    upstream: Float[Tensor, "row d_in"],
    into_pre: Float[Tensor, "firing"],
    into_b_dec: Float[Tensor, "d_in"],
) -> ByFeature:
    """Write the gradients of the four weights that every variant has; return the firings by feature.

    `upstream` is the gradient of what the codes decode to, `into_pre` that of the pre-activations W_enc (x - b_dec) + b_enc,
    `into_b_dec` that of b_dec as part of the reconstruction. Rows are tokens, or equally many parts of each token.
    """
    parts = len(upstream) // len(centred)
    of_device = kernels(centred)
    firings = codes.by_feature(len(sae.W_dec))
    of_device.sums(firings, codes.values, upstream, gradient.W_dec)
    by_token = firings._replace(rows=firings.rows // parts) if parts > 1 else firings
    of_device.sums(by_token, into_pre, centred, gradient.W_enc_rows)
    gradient.b_enc.copy_(of_device.totals(firings, into_pre))
    gradient.b_dec.copy_(into_b_dec - gradient.b_enc @ sae.W_enc_rows)
    return firings
