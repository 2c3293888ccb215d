"""Families: features of all seeds, grouped by complete linkage on cosine, with at most one member a seed.

Every two members of a family reach the threshold, so that no chain of likenesses can join directions that are nearly orthogonal.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from torch import Tensor

from sae_stability.matching.pairs import CHUNK, reaches

Edges = tuple[Int[np.ndarray, "edge"], Int[np.ndarray, "edge"], Float[np.ndarray, "edge"]]


@dataclass(frozen=True)
class Families:
    """A partition of the live features of all seeds."""

    family: Int[np.ndarray, "seed d_sae"]
    """Index of each feature's family, larger ones first; -1 for dead features."""
    size: Int[np.ndarray, "family"]
    """Members, at most one a seed."""
    smallest_cosine: Float[np.ndarray, "family"]
    """Between any two members; NaN where there is one member."""

    def unique(self) -> Float[np.ndarray, "seed"]:
        """[n - 1]: how many families n of the S seeds meet, on average over all choices of n (rarefaction; Hurlbert 1971).

        A family of m members is missed by a share C(S - m, n) / C(S, n) of the choices.
        """
        seeds = len(self.family)
        n = np.arange(1, seeds + 1)[:, None]
        missed = np.exp(_log_choose(seeds - self.size, n) - _log_choose(seeds, n))
        return (1 - missed).sum(1)


def families(W_dec: Float[Tensor, "seed d_sae d_in"], threshold: float, alive: Bool[Tensor, "seed d_sae"]) -> Families:
    """Merge the two most alike groups whose members all reach the threshold, and so on, until no two are left."""
    seeds, d_sae, _ = W_dec.shape
    neighbours: dict[int, dict[int, float]] = {}
    members = {feature: [feature] for feature in alive.flatten().nonzero().squeeze(1).tolist()}
    smallest = dict.fromkeys(members, np.nan)
    queue = []
    for one, other, cosine in zip(*(part.tolist() for part in _edges(W_dec, threshold, alive)), strict=True):
        neighbours.setdefault(one, {})[other] = cosine
        neighbours.setdefault(other, {})[one] = cosine
        queue.append((-cosine, one, other))
    heapq.heapify(queue)
    following = seeds * d_sae
    while queue:
        negated, one, other = heapq.heappop(queue)
        if one not in members or other not in members:
            continue  # of a group that has been merged since
        # A group stays a neighbour only of those that both parts were neighbours of: all pairs must reach the threshold. Features
        # of one seed are never neighbours, so no family takes two.
        first, second = neighbours.pop(one), neighbours.pop(other)
        members[following], smallest[following] = members.pop(one) + members.pop(other), -negated
        common = {group: min(first[group], second[group]) for group in first.keys() & second.keys() if group in members}
        neighbours[following] = common
        for group, cosine in sorted(common.items()):
            neighbours[group][following] = cosine
            heapq.heappush(queue, (-cosine, group, following))
        following += 1
    groups = sorted(members, key=lambda group: (-len(members[group]), min(members[group])))
    family = np.full(seeds * d_sae, -1)
    for index, group in enumerate(groups):
        family[members[group]] = index
    size = np.array([len(members[group]) for group in groups])
    return Families(family.reshape(seeds, d_sae), size, np.array([smallest[group] for group in groups]))


def _edges(W_dec: Tensor, threshold: float, alive: Tensor) -> Edges:
    """Pairs of live features of different seeds, numbered over all seeds, that reach the threshold, and their cosines."""
    seeds, d_sae, _ = W_dec.shape
    directions = F.normalize(W_dec.float(), dim=2) * alive[:, :, None]  # a cosine with a dead feature is 0
    found = []
    for s in range(seeds):
        for t in range(s + 1, seeds):
            for start in range(0, d_sae, CHUNK):
                block = directions[s, start : start + CHUNK] @ directions[t].T
                rows, columns = reaches(block, threshold).nonzero(as_tuple=True)
                found.append((rows + s * d_sae + start, columns + t * d_sae, block[rows, columns]))
    return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))


def _log_choose(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    """The logarithm of the binomial coefficient; minus infinity where k > n."""
    inside = gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)
    return np.where(k <= n, inside, -np.inf)
