"""Families: features of all seeds, grouped around medoids, with at most one member a seed.

The *star* of a feature has the feature itself, its *medoid*, and of each other seed the feature most like it, if that one reaches
the threshold. So a feature that reappears in all of 11 other seeds has a star of 12. The best star is a family; then the best one
among the features that are left; and so on.

Two families whose medoids reach the threshold are left as they are. To merge them would be to keep, of each seed, the member most
like the better medoid, and to group what falls out anew, since it reappears too: where every seed splits a feature in two, the
halves are two families with a member in every seed. But the better star was taken first, when the other's members were still
there, so it has the best of each seed already, and what falls out is the other family.
"""

import heapq
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from torch import Tensor
from tqdm import tqdm

from sae_stability.matching.pairs import CHUNK, ROUNDING, reaches

Edges = tuple[Int[np.ndarray, "edge"], Int[np.ndarray, "edge"], Float[np.ndarray, "edge"]]


@dataclass(frozen=True)
class Families:
    """A partition of the live features of all seeds."""

    family: Int[np.ndarray, "seed d_sae"]
    """Index of each feature's family, larger ones first; -1 for dead features."""
    size: Int[np.ndarray, "family"]
    """Members, at most one a seed."""
    medoid: Int[np.ndarray, "family 2"]
    """Position of its seed, and feature."""
    mean_cosine: Float[np.ndarray, "family"]
    """Of the other members with the medoid; NaN where there is none."""

    def unique(self) -> Float[np.ndarray, "seed"]:
        """[n - 1]: how many families n of the S seeds meet, on average over all choices of n (rarefaction; Hurlbert 1971).

        A family of m members is missed by a share C(S - m, n) / C(S, n) of the choices.
        """
        seeds = len(self.family)
        n = np.arange(1, seeds + 1)[:, None]
        missed = np.exp(_log_choose(seeds - self.size, n) - _log_choose(seeds, n))
        return (1 - missed).sum(1)


def families(W_dec: Float[Tensor, "seed d_sae d_in"], threshold: float, alive: Bool[Tensor, "seed d_sae"]) -> Families:
    """Take the best star, and so on among the features that are left, until none is.

    The best star has most members; of equals, the largest sum of cosines with its medoid, in steps of `ROUNDING`; of equals, the
    medoid whose weights come first as bytes. None of this depends on the order of seeds or features; only copies of one another
    are told apart by their places. Memory is `CHUNK * d_sae` cosines, and those that reach the threshold.
    """
    seeds, d_sae, _ = W_dec.shape
    rank = _rank(W_dec)
    others, cosines, start = _neighbours(W_dec, threshold, alive, rank)
    left = alive.flatten().tolist()

    def star(medoid: int) -> tuple[list[int], int]:
        """Its members but the medoid, among the features that are left, and the sum of their cosines with it."""
        members, total, seed = [], 0, -1
        part = slice(start[medoid], start[medoid + 1])
        for other, cosine in zip(others[part].tolist(), cosines[part].tolist(), strict=True):
            if left[other] and other // d_sae != seed:
                members.append(other)
                total += cosine
                seed = other // d_sae
        return members, total

    def entry(medoid: int, members: list[int], total: int) -> tuple[int, int, int, int]:
        return -len(members), -total, rank[medoid], medoid

    queue = [entry(feature, *star(feature)) for feature in np.flatnonzero(left).tolist()]
    heapq.heapify(queue)
    family = np.full(seeds * d_sae, -1)
    medoids: list[int] = []
    size: list[int] = []
    mean_cosine: list[float] = []
    while queue:
        best = heapq.heappop(queue)
        medoid = best[-1]
        if not left[medoid]:
            continue
        members, total = star(medoid)
        if entry(medoid, members, total) != best:  # some of it was taken since: stars only get worse, so the next may be better
            heapq.heappush(queue, entry(medoid, members, total))
            continue
        for feature in (medoid, *members):
            family[feature], left[feature] = len(medoids), False
        medoids.append(medoid)
        size.append(1 + len(members))
        mean_cosine.append(total * ROUNDING / len(members) if members else np.nan)
    places = np.stack(np.divmod(np.array(medoids, dtype=int), d_sae), axis=1)
    return Families(family.reshape(seeds, d_sae), np.array(size, dtype=int), places, np.array(mean_cosine))


def _rank(W_dec: Float[Tensor, "seed d_sae d_in"]) -> list[int]:
    """The place of each feature, numbered over all seeds, in the order of its weights as bytes: one that no permutation changes."""
    rows = np.ascontiguousarray(W_dec.float().cpu().flatten(0, 1).numpy())
    order = rows.view(f"V{rows.strides[0]}").ravel().argsort(kind="stable")
    return order.argsort().tolist()


def _neighbours(
    W_dec: Float[Tensor, "seed d_sae d_in"], threshold: float, alive: Bool[Tensor, "seed d_sae"], rank: list[int]
) -> tuple[Int[np.ndarray, "neighbour"], Int[np.ndarray, "neighbour"], Int[np.ndarray, "start"]]:
    """What reaches the threshold with each feature, by seed and most alike first: `start[i] : start[i + 1]` of feature i.

    Gives the features, numbered over all seeds, their cosines in steps of `ROUNDING`, and where each feature's begin.
    """
    seeds, d_sae, _ = W_dec.shape
    one, other, cosine = _edges(W_dec, threshold, alive)
    medoid, member = np.concatenate([one, other]), np.concatenate([other, one])
    steps = np.rint(np.concatenate([cosine, cosine]) / ROUNDING).astype(int)
    order = np.lexsort((np.array(rank)[member], -steps, member // d_sae, medoid))
    return member[order], steps[order], np.searchsorted(medoid[order], np.arange(seeds * d_sae + 1))


def _edges(W_dec: Tensor, threshold: float, alive: Tensor) -> Edges:
    """Pairs of live features of different seeds, numbered over all seeds, that reach the threshold, and their cosines."""
    seeds, d_sae, _ = W_dec.shape
    directions = F.normalize(W_dec.float(), dim=2) * alive[:, :, None]  # a cosine with a dead feature is 0
    found = []
    # One of each for all pairs: between new ones lie the few that are kept, and the heap grows by the size of all.
    cosines, reached = directions.new_empty(CHUNK, d_sae), torch.empty(CHUNK, d_sae, dtype=torch.bool, device=directions.device)
    for s, t in tqdm(list(combinations(range(seeds), 2)), "stars", unit="pair", disable=None, leave=False):
        for start in range(0, d_sae, CHUNK):
            rows_of = directions[s, start : start + CHUNK]
            block = torch.matmul(rows_of, directions[t].T, out=cosines[: len(rows_of)])
            rows, columns = reaches(block, threshold, out=reached[: len(rows_of)]).nonzero(as_tuple=True)
            found.append((rows + s * d_sae + start, columns + t * d_sae, block[rows, columns]))
    first, second, cosine = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return first, second, cosine


def _log_choose(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    """The logarithm of the binomial coefficient; minus infinity where k > n."""
    inside = gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)
    return np.where(k <= n, inside, -np.inf)
