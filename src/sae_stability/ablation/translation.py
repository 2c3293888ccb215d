"""One seed's features in the words of another seed: can its latents predict them, and can they stand in for them?

Seed s is set beside the next one, t. Sets of features are given for each pair, as a member [s, t, i]: the bands of such a set come
from the seeds other than t, so that what t is asked has no part in the choice (PAPER, No double dipping).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from sae_stability import threads
from sae_stability.evaluation import Encoded
from sae_stability.language.interventions import Predictions, Reading, intervene
from sae_stability.saes.ensemble import Ensemble

LATENTS = (1, 2, 4, 8)  # of the other seed, that may predict a feature together
PREDICTED = 0.5  # share of its variance from which a feature counts as predicted
CONTAINED = 0.5  # share of its firings from which a feature counts as part of another
BROADER = 2  # times as often as the feature fires the latent of which it is a part
CELLS = 2**20  # covariances with latents that are held at a time, for each latent chosen
RAREST = 50  # firings on either half of the tokens; below, no regression can be judged
TRANSPLANTS = ("removed", "averaged", "transplanted")
FATES = ("rotated", "split", "merged", "missing", "too rare")


@dataclass(frozen=True)
class Translation:
    """How well the latents of another seed predict features, on tokens on which nothing was fitted."""

    explained: Float[np.ndarray, "feature latents"]
    """Share of the variance of each feature that the best 1, 2, 4 and 8 latents explain."""
    contained: Float[np.ndarray, "feature"]
    """The share of its firings on which the first latent fires too."""
    ratio: Float[np.ndarray, "feature"]
    """How many times as often as the feature the first latent fires."""
    firings: Int[np.ndarray, "feature"]
    """Tokens on which each feature fires, on the rarer half."""

    @property
    def fate(self) -> np.ndarray:
        """What became of each feature in the other seed, as an index into `FATES`, by a rule in this order.

        `too rare` to tell; `rotated`: one latent predicts it, whatever its direction; `split`: several do together; `merged`: it
        fires where one latent does, which fires elsewhere too; `missing` else.
        """
        rules = [
            self.firings < RAREST,
            self.explained[:, 0] >= PREDICTED,
            self.explained[:, -1] >= PREDICTED,
            (self.contained >= CONTAINED) & (self.ratio >= BROADER),
        ]
        return np.select(rules, [FATES.index(name) for name in ("too rare", "rotated", "split", "merged")], FATES.index("missing"))


def translate(features: sparse.csr_array, latents: sparse.csr_array, fitted: Bool[np.ndarray, "token"]) -> Translation:
    """Regress each column of `features` [token, feature] on the best columns of `latents` [token, latent], activations both.

    Latents are chosen one after another, each the one that takes most off what is left (orthogonal matching pursuit); choice and
    coefficients come from the `fitted` tokens, and are judged on the others.
    """
    halves = [_Moments(features[rows], latents[rows]) for rows in (fitted, ~fitted)]
    # A chunk of features at a time: its covariances with all latents are what is held in memory.
    chunks = np.array_split(np.arange(features.shape[1]), max(1, -(-features.shape[1] * latents.shape[1] // CELLS)))
    first, explained = (np.concatenate(found) for found in zip(*(_pursue(*halves, chunk) for chunk in chunks), strict=True))
    fires, others = (matrix.copy() for matrix in (features, latents))
    fires.data, others.data = ((matrix.data > 0).astype(np.float32) for matrix in (fires, others))
    together = np.asarray(fires.multiply(others[:, first]).sum(0)).ravel()
    own, theirs = (np.asarray(matrix.sum(0)).ravel() for matrix in (fires, others))
    rarer = np.minimum(*(np.asarray(fires[rows].sum(0)).ravel() for rows in (fitted, ~fitted)))
    often = np.maximum(own, 1)
    return Translation(explained, together / often, theirs[first] / often, rarer.astype(int))


def translate_to_next(
    held_out: Encoded, cluster: Int[np.ndarray, "token"], members: dict[str, Bool[Tensor, "seed seed d_sae"]]
) -> pd.DataFrame:
    """Translate the features of some bands of each seed into the latents of the next one, fitted on every other cluster.

    One row a feature. Columns: band, seed, feature, fate, firings, contained, ratio, explained_1, _2, _4, _8.
    """
    seeds = held_out.ensemble.seeds
    codes = [held_out.matrix(position) for position in range(len(seeds))]
    fitted = np.unique(cluster[: len(held_out.activations)], return_inverse=True)[1] % 2 == 0
    columns = ("band", "seed", "feature", "fate", "firings", "contained", "ratio", *(f"explained_{size}" for size in LATENTS))

    def of_seed(position: int) -> pd.DataFrame:
        following = (position + 1) % len(codes)
        of_band = {band: member[position, following].nonzero()[:, 0].numpy() for band, member in members.items()}
        features = np.concatenate(list(of_band.values()))
        if not len(features):
            return pd.DataFrame(columns=columns)
        translation = translate(codes[position][:, features], codes[following], fitted)
        band = np.repeat(list(of_band), [len(chosen) for chosen in of_band.values()])
        fate, own = np.array(FATES)[translation.fate], (translation.firings, translation.contained, translation.ratio)
        values = (band, seeds[position], features, fate, *own, *translation.explained.T)
        return pd.DataFrame(dict(zip(columns, values, strict=True)))

    parts = threads.each_seed(of_seed, len(codes), "translation")
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


def transplant(
    site: Reading, ensemble: Ensemble, member: Bool[Tensor, "seed seed d_sae"], mean: Float[Tensor, "seed d_sae"]
) -> Predictions:
    """What the model predicts where another seed writes what a set of features wrote; the error stays.

    Interventions are named (what, position of the seed): the set's contribution is `removed`, set to its average (`averaged`,
    from the `mean` of each activation), or `transplanted`: replaced by that of the next seed's set.
    """

    def edits(x: Tensor) -> Iterator[tuple[tuple[str, int], Tensor]]:
        saes = list(ensemble.codes(ensemble.normalise(x)))

        def written(seed: int, other: int) -> Tensor:
            sae, codes = saes[seed]
            return codes.of(member[seed, other]).decode(sae.W_dec) / ensemble.scale

        for seed in range(len(saes)):
            following = (seed + 1) % len(saes)
            own = written(seed, following)
            average = (mean[seed] * member[seed, following]).float() @ ensemble.W_dec[seed] / ensemble.scale
            yield ("removed", seed), x - own
            yield ("averaged", seed), x - own + average
            yield ("transplanted", seed), x - own + written(following, seed)

    return intervene(site, edits, "transplant")


class _Moments:
    """Covariances of features and latents on some tokens, computed where they are asked for."""

    def __init__(self, features: sparse.csr_array, latents: sparse.csr_array):
        self.features, self.latents, self.rows = features.tocsc(), latents.tocsc(), features.shape[0]
        self.feature_mean, self.latent_mean = (np.asarray(matrix.mean(0)).ravel() for matrix in (features, latents))
        self.variance = self._double(np.asarray(features.multiply(features).mean(0)).ravel() - self.feature_mean**2)
        self.latent_variance = self._double(
            np.asarray(latents.multiply(latents).sum(0)).ravel() / self.rows - self.latent_mean * self.latent_mean
        )

    def of_latents(self, columns: Int[np.ndarray, "column"], rows=slice(None)) -> Float[Tensor, "latent column"]:
        """Covariances of some latents, or all, with others of them."""
        together = (self.latents[:, rows].T @ self.latents[:, columns]).toarray() / self.rows
        return self._double(together - np.outer(self.latent_mean[rows], self.latent_mean[columns]))

    def with_features(self, chunk: Int[np.ndarray, "feature"], rows=slice(None)) -> Float[Tensor, "latent feature"]:
        """Covariances of some latents, or all, with some features."""
        together = (self.latents[:, rows].T @ self.features[:, chunk]).toarray() / self.rows
        return self._double(together - np.outer(self.latent_mean[rows], self.feature_mean[chunk]))

    @staticmethod
    def _double(array: np.ndarray) -> Float[Tensor, "*any"]:
        return torch.from_numpy(np.asarray(array, dtype=np.float64))


def _pursue(
    fitted: _Moments, judged: _Moments, chunk: Int[np.ndarray, "feature"]
) -> tuple[Int[np.ndarray, "feature"], Float[np.ndarray, "feature latents"]]:
    """The first latent chosen for each feature, and the share of its variance that the first 1, 2, 4 and 8 explain."""
    across, length = fitted.with_features(chunk), fitted.latent_variance.clamp_min(1e-12).sqrt()
    left, chosen = across, torch.zeros(len(chunk), 0, dtype=torch.long)
    squares = across.new_zeros(*across.shape, 0)  # [latent, feature, size]: covariances with the latents chosen for the feature
    weights = {}
    for size in range(1, LATENTS[-1] + 1):
        gain = (left / length[:, None]).abs().T
        best = gain.scatter(1, chosen, -1.0).argmax(1)
        chosen = torch.cat([chosen, best[:, None]], 1)
        squares = torch.cat([squares, fitted.of_latents(best.numpy())[:, :, None]], 2)
        among = squares.gather(0, chosen.T[:, :, None].expand(-1, -1, size)).transpose(0, 1)
        fit = torch.linalg.solve(among + 1e-6 * torch.eye(size), across.T.gather(1, chosen)[:, :, None])
        left = across - torch.einsum("lfk,fk->lf", squares, fit[:, :, 0])
        weights[size] = fit
    names, place = np.unique(chosen.numpy(), return_inverse=True)
    place = torch.from_numpy(place.reshape(chosen.shape))
    squares, across = judged.of_latents(names, names), judged.with_features(chunk, names)
    variance = judged.variance[chunk]
    shares = [_explained(weights[size], place[:, :size], squares, across, variance) for size in LATENTS]
    return chosen[:, 0].numpy(), torch.stack(shares, 1).numpy()


def _within(squares: Tensor, chosen: Tensor) -> Float[Tensor, "feature size size"]:
    return squares[chosen[:, :, None], chosen[:, None, :]]


def _explained(weights: Tensor, chosen: Tensor, squares: Tensor, across: Tensor, variance: Tensor) -> Float[Tensor, "feature"]:
    """1 - variance of what is left over variance: b.G.b - 2 b.c over v, with moments of tokens on which b was not fitted."""
    crossed = (weights[:, :, 0] * across.T.gather(1, chosen)).sum(1)
    predicted = (weights.mT @ _within(squares, chosen) @ weights)[:, 0, 0]
    return (2 * crossed - predicted) / variance.clamp_min(1e-12)
