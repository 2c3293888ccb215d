"""How good SAEs are on held-out documents: explained variance, L0, firing frequencies, the model's loss when spliced in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from sae_stability.language.activations import Activations
from sae_stability.language.interventions import Reading, intervene
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sparse import Codes, Parameters
from sae_stability.statistics import Interval, bootstrap_ratio

ROWS = 8192  # tokens encoded at a time

Rebuilt = Iterator[tuple[Int[Tensor, "firing"], Float[Tensor, "token d_in"]]]
"""Of each of several SAEs the feature of each firing, and the error of the reconstruction."""


@dataclass(frozen=True)
class Fit:
    """What each seed's SAE does on held-out activations."""

    firings: Int[Tensor, "seed d_sae"]
    """Tokens on which each feature fires; none: the feature is dead."""
    rows: int
    """Tokens measured."""
    residual: Float[np.ndarray, "seed cluster"]
    """Squared error summed over the tokens of each cluster."""
    total: Float[np.ndarray, "cluster"]
    """Squared distance from the mean activation summed over the tokens of each cluster."""

    @property
    def frequency(self) -> Float[Tensor, "seed d_sae"]:
        return self.firings / self.rows

    @property
    def l0(self) -> Float[Tensor, "seed"]:
        return self.firings.sum(1) / self.rows

    def explained_variance(self, seed: int) -> Interval:
        """Of the SAE at position `seed`; clusters are resampled."""
        return bootstrap_ratio(self.residual[seed], self.total, lambda ratio: 1 - ratio)


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats, summed over the tokens of each cluster, under interventions at one site."""

    clean: Float[np.ndarray, "cluster"]
    zero: Float[np.ndarray, "cluster"]
    """With the site set to zero."""
    mean: Float[np.ndarray, "cluster"]
    """With the site set to its mean."""
    spliced: Float[np.ndarray, "seed cluster"]
    """With each seed's reconstruction in place of the site."""
    tokens: Int[np.ndarray, "cluster"]

    def per_token(self, sums: Float[np.ndarray, "cluster"]) -> Interval:
        return bootstrap_ratio(sums, self.tokens)

    def recovered(self, seed: int) -> Interval:
        """Cross-entropy recovered: (zero - spliced) / (zero - clean), 1 for a perfect SAE; clusters are resampled."""
        return bootstrap_ratio(self.zero - self.spliced[seed], self.zero - self.clean)


def fit(ensemble: Ensemble, activations: Activations, cluster: Int[np.ndarray, "token"]) -> Fit:
    """Measure every seed on held-out `activations`, whose rows come from `cluster`."""

    def rebuilt(x: Float[Tensor, "token d_in"]) -> Rebuilt:
        normalised = ensemble.normalise(x)
        for sae, codes in ensemble.codes(normalised):
            yield codes.fired(), codes.decode(sae.W_dec) + sae.b_dec - normalised

    return fit_of(rebuilt, (len(ensemble.seeds), ensemble.d_sae), activations, cluster, ensemble)


def fit_of(
    rebuilt: Callable[[Float[Tensor, "token d_in"]], Rebuilt],
    shape: tuple[int, int],
    activations: Activations,
    cluster: Int[np.ndarray, "token"],
    units: Ensemble,
) -> Fit:
    """Measure whatever rebuilds activations: `rebuilt` gives what each of several does on raw ones, `shape` how many these are, and
    how many features each has. Errors are in the normalised units of an ensemble."""
    rows = len(activations)
    kinds, cluster = np.unique(cluster[:rows], return_inverse=True)
    firings = torch.zeros(shape, dtype=torch.int64)
    residual, total = np.zeros((shape[0], len(kinds))), np.zeros(len(kinds))
    centre = (activations.mean - units.mean) * units.scale  # of the held-out tokens
    for start in tqdm(range(0, rows, ROWS), "evaluation", unit="batch", disable=None):
        x, of = activations.data[start : start + ROWS], cluster[start : start + ROWS]
        total += np.bincount(of, (units.normalise(x) - centre).square().sum(1).numpy(), len(kinds))
        for position, (fired, error) in enumerate(rebuilt(x)):
            residual[position] += np.bincount(of, error.square().sum(1).numpy(), len(kinds))
            firings[position] += torch.bincount(fired, minlength=shape[1])
    return Fit(firings, rows, residual, total)


@dataclass(frozen=True)
class Encoded:
    """Held-out activations and the codes that every seed gives them: encoded once for all that is asked of them."""

    ensemble: Ensemble
    activations: Activations
    codes: list[list[Codes]]
    """Of each batch of `ROWS` tokens, each seed's."""

    @classmethod
    def of(cls, ensemble: Ensemble, activations: Activations) -> "Encoded":
        batches = (ensemble.normalise(part) for part in activations.data.split(ROWS))
        return cls(ensemble, activations, [[codes for _, codes in ensemble.codes(x)] for x in batches])

    def batches(self) -> Iterator[tuple[slice, Float[Tensor, "token d_in"], list[tuple[Parameters, Codes]]]]:
        """In turn which tokens they are, their normalised activations, and each seed's SAE and codes."""
        for number, codes in enumerate(self.codes):
            rows = slice(number * ROWS, (number + 1) * ROWS)
            yield rows, self.ensemble.normalise(self.activations.data[rows]), list(zip(self.ensemble.saes, codes, strict=True))

    def matrix(self, position: int) -> sparse.csr_array:
        """The feature activations [token, d_sae] of the SAE at `position` of the seeds."""
        parts = []
        for codes in (of_seed[position] for of_seed in self.codes):
            arrays = (codes.values.numpy(), codes.features.numpy(), codes.starts.numpy())
            parts.append(sparse.csr_array(arrays, shape=(len(codes.starts) - 1, self.ensemble.d_sae)))
        return sparse.vstack(parts, format="csr")

    def matrices(self) -> list[sparse.csr_array]:
        """Those of every seed."""
        return [self.matrix(position) for position in range(len(self.ensemble.seeds))]


def sparse_codes(ensemble: Ensemble, activations: Activations) -> list[sparse.csr_array]:
    """Each seed's feature activations [token, d_sae] on the same tokens."""
    return Encoded.of(ensemble, activations).matrices()


def losses(site: Reading, ensemble: Ensemble) -> Losses:
    """Cross-entropy of the model on held-out tokens, clean and under each intervention."""

    def edits(x: Tensor) -> Iterator[tuple[int | str, Tensor]]:
        yield "zero", torch.zeros_like(x)
        yield "mean", ensemble.mean.expand_as(x)
        for seed in range(len(ensemble.seeds)):
            yield seed, ensemble.reconstruct(seed, x)

    predicted = intervene(site, edits, "losses")
    spliced = np.stack([predicted.nats[seed] for seed in range(len(ensemble.seeds))])
    return Losses(predicted.clean, predicted.nats["zero"], predicted.nats["mean"], spliced, predicted.tokens)
