"""The weights of an SAE, and what every variant's weights can do: fold a normalisation in, go to another library."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Parameters:
    """The weights of one SAE, or of all seeds with a leading axis. A variant with more of them extends this class.

    Like a named tuple it iterates over its tensors in the order of its fields, so that `type(sae)(*tensors)` makes another.
    """

    W_enc_rows: Float[Tensor, "*seed d_sae d_in"]
    """The encoder, one row a feature: `W_enc` transposed, as gradients and optimiser like it in memory."""
    b_enc: Float[Tensor, "*seed d_sae"]
    W_dec: Float[Tensor, "*seed d_sae d_in"]
    b_dec: Float[Tensor, "*seed d_in"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._asdict().values())

    def _asdict(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _replace(self, **tensors: Tensor) -> "Parameters":
        return replace(self, **tensors)

    def scaled(self, scale: float, mean: Float[Tensor, "d_in"]) -> "Parameters":
        """The same SAE on raw activations, where this one takes scale * (x - mean), as training does.

        Every variant is homogeneous: offsets divided by the scale give codes divided by it, and the same features fire. The mean
        joins the decoder's bias, which encoders subtract. A variant with offsets of its own extends this.
        """
        return self._replace(b_enc=self.b_enc / scale, b_dec=self.b_dec / scale + mean)

    def exported(self) -> dict[str, Tensor]:
        """The tensors of one SAE under SAELens's names. A variant with tensors of its own extends this."""
        return {name: tensor for name, tensor in self._asdict().items() if name != "W_enc_rows"} | {"W_enc": self.W_enc_rows.mT}
