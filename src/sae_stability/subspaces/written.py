"""What a set of features adds to the reconstruction of a text: the covariance of its contributions, by parts of the documents.

A set U of a seed writes w = sum over i in U of z_i d_i on a token, with z_i the activation of feature i and d_i its direction. The
subspace of U is spanned by the strongest axes of the covariance of w (PAPER, Reproducible subspace).
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_stability.subspaces.geometry import strongest_axes

PARTS = 8
"""Parts of the documents, each left out in turn. The two halves on which the seeds of a pair are read have every other one."""
WHOLE = 1 << 27  # bytes up to which the products of all features of a seed are held, so that none are made for a set
SAMPLED = 20  # tokens of which one is taken to correlate what sets write

Members = Int[np.ndarray, "member"]
"""A set, by the numbers of its features."""


def parts_of(cluster: Int[np.ndarray, "token"]) -> Int[np.ndarray, "token"]:
    """The part of the documents to which each token belongs, by its cluster: `PARTS`, or as many as there are clusters."""
    place = np.unique(cluster, return_inverse=True)[1]
    return place % max(1, min(PARTS, place.max(initial=0) + 1))


def sampled_rows(part: Int[np.ndarray, "token"]) -> Int[np.ndarray, "sampled"]:
    """The tokens of `Written.on_sample`: one of `SAMPLED`, part after part."""
    return np.concatenate([np.flatnonzero(part == number)[::SAMPLED] for number in range(part.max(initial=0) + 1)])


@dataclass(frozen=True)
class Moments:
    """What a set of features writes, by parts of the documents: its directions, and sums over the tokens of each part."""

    directions: Float[np.ndarray, "member d_in"]
    second: Float[np.ndarray, "part member member"]
    """Of the products of two activations."""
    first: Float[np.ndarray, "part member"]
    """Of the activations."""
    tokens: Int[np.ndarray, "part"]

    def mapped(self, by: Float[np.ndarray, "d_in d_in"]) -> "Moments":
        """The same in other coordinates: what is written is multiplied by a matrix from the right."""
        return replace(self, directions=self.directions @ by)

    def covariance(self, parts: Int[np.ndarray, "chosen"]) -> Float[np.ndarray, "d_in d_in"]:
        """Of what the set writes on some parts of the documents, centred on these."""
        return self.directions.T @ self._of_activations(parts) @ self.directions

    def strongest_axes(self, parts: Int[np.ndarray, "chosen"]) -> tuple[Float[np.ndarray, "d_in axis"], Float[np.ndarray, "axis"]]:
        """Of that covariance: as many as it can have. Those of a small set are found in the few dimensions of its directions."""
        return self.spectrum(parts)[1:]

    def spectrum(
        self, parts: Int[np.ndarray, "chosen"]
    ) -> tuple[Float[np.ndarray, "d_in d_in"], Float[np.ndarray, "d_in axis"], Float[np.ndarray, "axis"]]:
        """The covariance, its `strongest_axes` and the energy along each."""
        members, d_in = self.directions.shape
        of_activations = self._of_activations(parts)
        covariance = self.directions.T @ of_activations @ self.directions
        if members > d_in / 2:
            return covariance, *strongest_axes(covariance)
        basis, inside = np.linalg.qr(self.directions.T)
        axes, energies = strongest_axes(inside @ of_activations @ inside.T)
        return covariance, basis @ axes, energies

    def _of_activations(self, parts: Int[np.ndarray, "chosen"]) -> Float[np.ndarray, "member member"]:
        tokens = self.tokens[parts].sum()
        mean = self.first[parts].sum(0) / tokens
        return self.second[parts].sum(0) / tokens - np.outer(mean, mean)


class Written:
    """What the features of one seed write on a text."""

    def __init__(self, codes: sparse.csr_array, directions: Float[np.ndarray, "d_sae d_in"], part: Int[np.ndarray, "token"]):
        """`codes` [token, d_sae] are feature activations, and `part` says to which part of the documents each token belongs."""
        self.directions, self.together = directions.astype(np.float64), True
        self.parts = [codes[part == number].astype(np.float64).tocsc() for number in range(part.max(initial=0) + 1)]

    def alone_in(self, directions: Float[np.ndarray, "d_sae d_in"]) -> "Written":
        """What other directions would write with each feature's energy, firing on their own: no two activations are correlated."""
        other = copy(self)
        other.directions, other.together = directions.astype(np.float64), False
        return other

    @cached_property
    def tokens(self) -> Int[np.ndarray, "part"]:
        return np.array([part.shape[0] for part in self.parts])

    @cached_property
    def energy(self) -> Float[np.ndarray, "d_sae"]:
        """The mean square of each feature's activation: its direction has unit length."""
        return self._squares.sum(0) / self.tokens.sum()

    @cached_property
    def firings(self) -> Int[np.ndarray, "d_sae"]:
        """On how many tokens each feature fires."""
        return sum(np.diff(part.indptr) for part in self.parts)

    def moments(self, members: Members) -> Moments:
        """Of what a set writes."""
        first = self._sums[:, members]
        if self.together:
            return Moments(self.directions[members], self._second(members), first, self.tokens)
        variances = self._squares[:, members] - first**2 / self.tokens[:, None]
        return Moments(self.directions[members], variances[:, :, None] * np.eye(len(members)), np.zeros_like(first), self.tokens)

    def _second(self, members: Members) -> Float[np.ndarray, "part member member"]:
        """The products of the activations of two members, summed over each part."""
        if self._products is not None:
            return self._products[:, members[:, None], members]
        chosen = (part[:, members] for part in self.parts)
        return np.stack([(part.T @ part).toarray() for part in chosen])

    @cached_property
    def _products(self) -> Float[np.ndarray, "part d_sae d_sae"] | None:
        if len(self.parts) * len(self.directions) ** 2 * np.dtype(np.float64).itemsize > WHOLE:
            return None
        return np.stack([(part.T @ part).toarray() for part in self.parts])

    @cached_property
    def _sums(self) -> Float[np.ndarray, "part d_sae"]:
        """The activations, summed over each part."""
        return np.stack([np.asarray(part.sum(0)).ravel() for part in self.parts])

    @cached_property
    def _squares(self) -> Float[np.ndarray, "part d_sae"]:
        """Their squares."""
        return np.stack([np.asarray(part.multiply(part).sum(0)).ravel() for part in self.parts])

    @cached_property
    def sampled_part(self) -> Int[np.ndarray, "token"]:
        """The part of the documents of each token of `on_sample`."""
        return np.repeat(np.arange(len(self.parts)), [-(-tokens // SAMPLED) for tokens in self.tokens])

    @cached_property
    def _sample(self) -> sparse.csc_array:
        return sparse.vstack([part.tocsr()[::SAMPLED] for part in self.parts]).tocsc()

    def on_sample(self, members: Members) -> Float[np.ndarray, "token d_in"]:
        """What a set writes on one of `SAMPLED` tokens, centred: on the same ones whichever seed it is."""
        written = self._sample[:, members] @ self.directions[members]
        return written - written.mean(0)
