"""Every feature of one dictionary against every feature of another, a chunk of rows at a time.

Memory is `CHUNK` rows of similarities: it does not grow with the square of the dictionary.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numba import njit, prange
from scipy import sparse
from torch import Tensor

from sae_stability import threads

CHUNK = 1024  # rows
SLAB = 512  # columns that one thread keeps up to date: what it remembers of them fits in its cache
NOTHING = -2.0  # lower than any similarity
FEWEST = 50
"""Firings of a feature from which correlations of its activations are told: of two that fire once, on the same token, it is 1."""
ROUNDING = 1e-6  # a cosine of 1 comes out of float32 as 1 - 1e-7, and must pass a threshold of 1

Similarities = Callable[[Int[Tensor, "row"]], Float[Tensor, "row b"]]
"""Gives the similarities of some features of one dictionary with all features of the other, in a tensor of its own."""


class Best(NamedTuple):
    """What another dictionary has that is most like each feature of this one. Of equals, the first."""

    similarity: Float[Tensor, "feature"]
    partner: Int[Tensor, "feature"]
    """Whose similarity that is; -1 where there is none."""
    runner_up: Float[Tensor, "feature"]
    """The second largest similarity."""

    @classmethod
    def none(cls, features: int, device: torch.device) -> "Best":
        nothing = torch.full((features,), NOTHING, device=device)
        return cls(nothing, torch.full((features,), -1, dtype=torch.int64, device=device), nothing.clone())

    def at_least(self, similarity: float) -> "Best":
        """The same with smaller similarities raised to one."""
        return Best(self.similarity.clamp(min=similarity), self.partner, self.runner_up.clamp(min=similarity))


def compare(similarities: Similarities, a_alive: Bool[Tensor, "a"], b_alive: Bool[Tensor, "b"]) -> tuple[Best, Best]:
    """For each live feature of either dictionary, the live feature of the other that is most like it, from one pass.

    Dead features, and all where the other dictionary has no live one, get a similarity of -1 and no partner.
    """
    of_a, of_b = (Best.none(len(alive), alive.device) for alive in (a_alive, b_alive))
    dead = (~b_alive).nonzero().squeeze(1)
    for rows in a_alive.nonzero().squeeze(1).split(CHUNK):
        block = similarities(rows).index_fill_(1, dead, NOTHING)
        if block.device.type == "cpu":
            tensors = (tensor.numpy() for tensor in (block, rows, *of_a, *of_b))
            threads.call(_two_largest, *tensors, -(-block.shape[1] // SLAB))
        else:
            two_largest(block, rows, of_a, of_b)
    return of_a.at_least(-1), of_b.at_least(-1)


def cosines(A: Float[Tensor, "a d_in"], B: Float[Tensor, "b d_in"]) -> Similarities:
    """Of directions at unit length."""
    return lambda rows: A[rows] @ B.T


def reaches(similarity: Float[Tensor, "*any"], threshold: float, out: Bool[Tensor, "*any"] | None = None) -> Bool[Tensor, "*any"]:
    """Whether similarities reach a threshold, up to rounding: all that judges likeness asks here, so that no two answers differ."""
    return torch.ge(similarity, threshold - ROUNDING, out=out)


def weaker(one: Similarities, other: Similarities) -> Similarities:
    """The smaller of two similarities: features are alike in both ways, or they are not."""
    return lambda rows: torch.minimum(one(rows), other(rows))


class Activity(NamedTuple):
    """The activations of an SAE on some tokens, laid out for correlations."""

    codes: sparse.csr_array  # [token, feature]
    by_feature: sparse.csr_array
    mean: Float[np.ndarray, "feature"]
    spread: Float[np.ndarray, "feature"]
    """Standard deviation; infinite for what never varies, which then correlates with nothing."""

    @classmethod
    def of(cls, codes: sparse.csr_array) -> "Activity":
        mean = np.asarray(codes.mean(axis=0)).ravel()
        variance = np.asarray(codes.multiply(codes).mean(axis=0)).ravel() - mean**2
        spread = np.where(variance > 0, np.sqrt(np.maximum(variance, 0)), np.inf)
        return cls(codes, codes.T.tocsr(), mean, spread)


def firings(codes: sparse.sparray) -> Int[np.ndarray, "feature"]:
    """On how many tokens each feature fires, of activations [token, feature]."""
    return np.asarray((codes > 0).sum(axis=0)).ravel()


def correlations(A: Activity, B: Activity) -> Similarities:
    """Pearson's, of the activations of two SAEs on the same tokens; 0 for what never fires."""
    tokens = A.codes.shape[0]

    def block(rows: Int[Tensor, "row"]) -> Float[Tensor, "row b"]:
        chosen = rows.numpy()
        together = np.zeros((len(chosen), len(B.mean)))
        parts = ((of.indptr, of.indices, of.data) for of in (A.by_feature, B.codes))
        threads.call(_inner, *next(parts), *next(parts), chosen, together)
        together = together / tokens - np.outer(A.mean[chosen], B.mean)
        return torch.from_numpy((together / np.outer(A.spread[chosen], B.spread)).astype(np.float32))

    return block


def nearest_within(directions: Float[Tensor, "d_sae d_in"], alive: Bool[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """The best cosine of each unit direction with another live one of its own dictionary; NaN for dead features."""

    def others(rows: Int[Tensor, "row"]) -> Float[Tensor, "row d_sae"]:
        return (directions[rows] @ directions.T).scatter_(1, rows[:, None], NOTHING)

    nearest, _ = compare(others, alive, alive)
    return nearest.similarity.masked_fill(~alive, torch.nan)


def two_largest(block: Float[Tensor, "row b"], rows: Int[Tensor, "row"], of_a: Best, of_b: Best) -> None:
    """Take the similarities of some features `rows` of one dictionary into what is best of both: the reference."""
    similarity, partner, runner_up = _two_along(block, 1)
    for whole, part in zip(of_a, (similarity, partner, runner_up), strict=True):
        whole[rows] = part
    similarity, partner, runner_up = _two_along(block, 0)
    better = similarity > of_b.similarity
    of_b.runner_up.copy_(torch.maximum(torch.maximum(of_b.runner_up, runner_up), torch.minimum(of_b.similarity, similarity)))
    of_b.partner.copy_(torch.where(better, rows[partner], of_b.partner))
    of_b.similarity.copy_(torch.maximum(of_b.similarity, similarity))


def _two_along(block: Float[Tensor, "row b"], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    largest, place = block.max(dim)
    others = block.scatter(dim, place.unsqueeze(dim), NOTHING)
    return largest, torch.where(largest > NOTHING, place, -1), others.amax(dim)


@njit(parallel=True, nogil=True, cache=True)
def _two_largest(block, rows, a_similarity, a_partner, a_runner_up, b_similarity, b_partner, b_runner_up, slabs):
    """`two_largest` as one pass over memory a direction."""
    count, columns = block.shape
    for i in prange(count):
        largest, second, place = block.dtype.type(NOTHING), block.dtype.type(NOTHING), -1
        for j in range(columns):
            value = block[i, j]
            if value > second:
                if value > largest:
                    second, largest, place = largest, value, j
                else:
                    second = value
        a_similarity[rows[i]], a_runner_up[rows[i]], a_partner[rows[i]] = largest, second, place
    for slab in prange(slabs):
        for i in range(count):
            row = rows[i]
            for j in range(slab * columns // slabs, (slab + 1) * columns // slabs):
                value, largest = block[i, j], b_similarity[j]
                b_runner_up[j] = max(b_runner_up[j], min(largest, value))
                b_partner[j] = row if value > largest else b_partner[j]
                b_similarity[j] = max(largest, value)


@njit(parallel=True, nogil=True, cache=True)
def _inner(starts, tokens, values, b_starts, b_features, b_values, chosen, out):
    """out[i]: the inner products of feature `chosen[i]`, by feature, with all features of B, by token. One row stays in cache."""
    for i in prange(len(chosen)):
        row = out[i]
        for p in range(starts[chosen[i]], starts[chosen[i] + 1]):
            value = np.float64(values[p])
            for q in range(b_starts[tokens[p]], b_starts[tokens[p] + 1]):
                row[b_features[q]] += value * b_values[q]
