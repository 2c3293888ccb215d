"""One SAE on raw activations, as files hold it: ours with the normalisation of training folded in, or another library's."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sparse import Codes, Parameters

OFFSETS = ("b_enc", "b_mag", "threshold")  # in units of activations, beside the decoder's bias


@dataclass(frozen=True)
class SAE:
    """What a file says of an SAE. `variant` is None where it holds directions only, and nothing that encodes."""

    variant: str | None
    k: int | None
    """The L0 that it was made for, where the file says so; TopK needs it."""
    parameters: Parameters

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.parameters.W_enc_rows.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.parameters.W_dec

    def codes(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Sparse feature activations of raw activations. Raises `UserError` for directions only."""
        if self.variant is None:
            raise UserError("SAE: this file holds a decoder only, which cannot encode; give the folder that holds the encoder too")
        return variant(self.variant)(self.k or 0).encode(self.parameters, x.float())

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Feature activations of raw activations; most are zero."""
        return self.codes(x).dense(len(self.W_dec))

    def decode(self, z: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """The reconstruction of raw activations."""
        return z @ self.W_dec + self.parameters.b_dec


def of_ensemble(ensemble: Ensemble, position: int) -> SAE:
    """The SAE of one seed on raw activations, in their units.

    Training sees scale * (x - mean). Every variant is homogeneous: offsets divided by the scale give codes divided by it, and the
    same features fire. The mean joins the decoder's bias, which encoders subtract.
    """
    normalised = type(ensemble.parameters)(*(tensor[position] for tensor in ensemble.parameters))
    folded = {name: getattr(normalised, name) / ensemble.scale for name in OFFSETS if hasattr(normalised, name)}
    if hasattr(normalised, "log_threshold"):
        folded["log_threshold"] = normalised.log_threshold - torch.tensor(ensemble.scale).log()
    folded["b_dec"] = normalised.b_dec / ensemble.scale + ensemble.mean
    return SAE(ensemble.variant, ensemble.k, normalised._replace(**folded))
