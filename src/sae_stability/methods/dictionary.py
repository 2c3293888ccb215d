"""What analyses need of anything that has features: an SAE from a file, one seed of an ensemble, a classical method."""

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability.saes.sparse import Codes


@runtime_checkable
class Dictionary(Protocol):
    """Features with a direction each, and how strongly each fires on raw activations.

    `saes.sae.SAE` is one; `Ensemble.dictionary(position)` gives that of one seed.
    """

    @property
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What a feature that fires with strength 1 adds to the reconstruction. Not at unit length: matching sees to that."""

    @property
    def signed(self) -> bool:
        """Whether codes can be negative. A direction's sign is then a convention, and matching takes |cosine|."""

    def codes(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """What fires on raw activations, and how strongly, in their units.

        Raises `UserError` where there are directions only and nothing that encodes.
        """

    def decode(self, z: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """The reconstruction of raw activations: `z @ directions` and a constant."""

    def without(self, features: Bool[Tensor, "d_sae"]) -> "Dictionary":
        """The same dictionary whose `features` never fire: their codes are zero, and all others what they were."""
