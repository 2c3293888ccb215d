"""One SAE on raw activations, as files hold it: ours with the normalisation of training folded in, or another library's."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.saes import variant
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sparse import Codes


@dataclass(frozen=True)
class SAE:
    """What a file says of an SAE. `variant` is None where it holds directions only, and nothing that encodes.

    It is a dictionary as analyses take them (`methods/dictionary.py`).
    """

    variant: str | None
    k: int | None
    """The L0 that it was made for, where the file says so; TopK needs it."""
    parameters: Parameters
    removed: Bool[Tensor, "d_sae"] | None = None
    """Features that take part in the choice of what fires, and then do not fire."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.parameters.W_enc_rows.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.parameters.W_dec

    @property
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder's rows, in the length that they have."""
        return self.W_dec

    @property
    def signed(self) -> bool:
        """Codes of an SAE are never negative."""
        return False

    def codes(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Sparse feature activations of raw activations.

        Raises `UserError` for directions only, and `ValueError` for activations of another width.
        """
        if self.variant is None:
            raise UserError("SAE: this file holds a decoder only, which cannot encode; give the folder that holds the encoder too")
        if x.shape[1] != self.W_dec.shape[1]:
            raise ValueError(f"x: d_in {x.shape[1]}, but the SAE has {self.W_dec.shape[1]}")
        codes = variant(self.variant)(self.k or 0).encode(self.parameters, x.float())
        return codes if self.removed is None else codes.of(~self.removed)

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Feature activations of raw activations; most are zero."""
        return self.codes(x).dense(len(self.W_dec))

    def decode(self, z: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """The reconstruction of raw activations."""
        return z @ self.W_dec + self.parameters.b_dec

    def without(self, features: Bool[Tensor, "d_sae"]) -> "SAE":
        """The same SAE whose `features` never fire. No other feature takes their place, not even among the k of a TopK."""
        return replace(self, removed=features if self.removed is None else self.removed | features)
