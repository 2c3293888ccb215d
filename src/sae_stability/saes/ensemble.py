"""An ensemble: the SAEs of one cell, one for each seed, on raw activations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from sae_stability.files import read_metadata, save_tensors
from sae_stability.saes import variant
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE
from sae_stability.saes.sparse import Codes


@dataclass(frozen=True)
class Ensemble:
    """SAEs that differ in their seed. They take raw activations: the normalisation of training is part of them.

    The decoder's rows have unit length.
    """

    variant: str
    k: int
    seeds: list[int]
    parameters: Parameters
    """With a leading `seed` axis, in normalised units."""
    mean: Float[Tensor, "d_in"]
    """Removed from activations before they are encoded."""
    scale: float
    """Activations less their mean are multiplied by it: their average norm is then sqrt(d_in)."""
    coefficient: float = 0.0
    """Weight of the sparsity penalty under which they were trained, where the variant has one."""

    @property
    def W_enc(self) -> Float[Tensor, "seed d_in d_sae"]:
        return self.parameters.W_enc_rows.mT

    @property
    def W_dec(self) -> Float[Tensor, "seed d_sae d_in"]:
        return self.parameters.W_dec

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "seed token d_sae"]:
        """Feature activations of every seed, in normalised units; most are zero."""
        return torch.stack([codes.dense(self.d_sae) for _, codes in self.codes(self.normalise(x))])

    def decode(self, z: Float[Tensor, "seed token d_sae"]) -> Float[Tensor, "seed token d_in"]:
        """The reconstruction of raw activations from feature activations."""
        return self.to_raw(z @ self.W_dec + self.parameters.b_dec[:, None])

    def codes(self, normalised: Float[Tensor, "token d_in"]) -> Iterator[tuple[Parameters, Codes]]:
        """Each seed's SAE and its sparse codes of normalised activations."""
        method = variant(self.variant)(self.k)
        return ((sae, method.encode(sae, normalised)) for sae in self.saes)

    @property
    def saes(self) -> list[Parameters]:
        """The SAE of each seed."""
        return [type(self.parameters)(*tensors) for tensors in zip(*self.parameters, strict=True)]

    def of(self, position: int) -> "Ensemble":
        """The ensemble of the one seed at `position`."""
        alone = type(self.parameters)(*(tensor[position : position + 1] for tensor in self.parameters))
        return replace(self, seeds=[self.seeds[position]], parameters=alone)

    def dictionary(self, position: int) -> SAE:
        """The SAE of the one seed at `position` on raw activations, in their units: what analyses and files take."""
        normalised = self.saes[position]
        return SAE(self.variant, self.k, normalised.scaled(self.scale, self.mean))

    def with_parameters(self, **tensors: Tensor) -> "Ensemble":
        """The same with other values of some parameters."""
        return replace(self, parameters=self.parameters._replace(**tensors))

    @classmethod
    def joined(cls, parts: list["Ensemble"]) -> "Ensemble":
        """One ensemble from several of the same cell."""
        if len(parts) == 1:
            return parts[0]
        tensors = zip(*(part.parameters for part in parts), strict=True)
        parameters = type(parts[0].parameters)(*map(torch.cat, tensors))
        return replace(parts[0], seeds=[seed for part in parts for seed in part.seeds], parameters=parameters)

    def reconstruct(self, position: int, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """What the SAE at `position` of `seeds` makes of raw activations."""
        sae, codes = next(self.of(position).codes(self.normalise(x)))
        return self.to_raw(codes.decode(sae.W_dec) + sae.b_dec)

    def normalise(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        return (x.float() - self.mean) * self.scale

    def to_raw(self, normalised: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any d_in"]:
        return normalised / self.scale + self.mean

    def save(self, path: Path) -> None:
        tensors = {**self.parameters._asdict(), "mean": self.mean}
        metadata = {"variant": self.variant, "k": self.k, "seeds": self.seeds, "scale": self.scale, "coefficient": self.coefficient}
        save_tensors(path, tensors, metadata)

    @classmethod
    def open(cls, path: Path) -> "Ensemble":
        tensors, metadata = load_file(path), read_metadata(path)
        mean = tensors.pop("mean")
        return cls(parameters=variant(metadata["variant"]).parameters(**tensors), mean=mean, **metadata)
