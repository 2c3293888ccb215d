"""Features of two dictionaries paired one to one, so that the sum of their cosines is largest (MCC; Song et al., arXiv:2505.20254).

Up to `EXACT` features a side the whole problem is solved (SciPy, a variant of Jonker-Volgenant). Above, only pairs among the best
few of either side are candidates, and a bound tells how much that can have cost.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.matching.pairs import CHUNK

EXACT = 4096  # features of two equal dictionaries, up to which every pair is looked at; of unequal ones their geometric mean
CANDIDATES = 16  # best ones of each feature, above that
UNPAIRED = 4.0  # cost of leaving a feature without a candidate, where that of a pair is 2 - cosine (SciPy takes 0 for no edge)


@dataclass(frozen=True)
class Assignment:
    """A one-to-one pairing of the features of A with those of B."""

    partner: Int[np.ndarray, "a"]
    """The feature of B that each one of A is paired with; -1 for those that B is too small for."""
    cosine: Float[np.ndarray, "a"]
    """Of each pair; NaN where there is none."""
    bound: float
    """No pairing has a larger mean cosine; where every pair was looked at, it is that of this one."""

    @property
    def mean(self) -> float:
        """The mean cosine of all pairs, MCC."""
        return float(np.nanmean(self.cosine))


def assign(A: Float[Tensor, "a d_in"] | np.ndarray, B: Float[Tensor, "b d_in"] | np.ndarray, exact: int = EXACT) -> Assignment:
    """Pair features one to one, so that the sum of cosines is largest. Directions need not have unit length.

    Every feature of the smaller dictionary is paired. Raises `UserError` where d_in differ or weights are not finite.
    """
    A, B = (torch.as_tensor(W).detach().float() for W in (A, B))
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1]:
        raise UserError(f"W_dec: dictionaries of shapes {list(A.shape)} and {list(B.shape)} have no common d_in")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise UserError("W_dec: holds NaN or infinite weights; leave that SAE out")
    A, B = F.normalize(A, dim=1), F.normalize(B, dim=1)
    partner = np.full(len(A), -1)
    if len(A) * len(B) <= exact**2:
        rows, columns = linear_sum_assignment((A @ B.T).cpu().numpy(), maximize=True)
        partner[rows] = columns
        cosine = _cosines_of(A, B, partner)
        return Assignment(partner, cosine, float(np.nanmean(cosine)))
    candidates, bound = _candidates(A, B)
    # A column of its own lets each feature stay without a candidate, so that some full pairing always exists.
    costs = sparse.hstack([candidates, sparse.diags_array(np.full(len(A), UNPAIRED))], format="csr")
    rows, columns = min_weight_full_bipartite_matching(costs)
    paired = columns < len(B)
    partner[rows[paired]] = columns[paired]
    left, free = np.flatnonzero(partner < 0), np.setdiff1d(np.arange(len(B)), partner)
    if len(left) and len(free):
        rest = (A[left] @ B[free].T).cpu().numpy()
        rows, columns = linear_sum_assignment(rest, maximize=True)
        partner[left[rows]] = free[columns]
    return Assignment(partner, _cosines_of(A, B, partner), bound)


def mcc(A: Float[Tensor, "a d_in"] | np.ndarray, B: Float[Tensor, "b d_in"] | np.ndarray) -> float:
    """Mean cosine of the best one-to-one pairing of two dictionaries (MCC; Song et al., arXiv:2505.20254)."""
    return assign(A, B).mean


def _cosines_of(A: Tensor, B: Tensor, partner: np.ndarray) -> Float[np.ndarray, "a"]:
    found = torch.from_numpy(partner)
    return torch.linalg.vecdot(A, B[found.clamp(min=0)]).masked_fill(found < 0, torch.nan).cpu().numpy()


def _candidates(A: Tensor, B: Tensor) -> tuple[sparse.csr_array, float]:
    """Costs 2 - cosine of the best candidates of either side, and a bound on the mean cosine of any pairing."""
    (a_rows, a_columns, a_cosines), (b_rows, b_columns, b_cosines) = _nearest(A, B), _nearest(B, A)
    rows, columns = np.concatenate([a_rows, b_columns]), np.concatenate([a_columns, b_rows])
    cosines = np.concatenate([a_cosines, b_cosines])
    _, once = np.unique(rows * len(B) + columns, return_index=True)
    costs = sparse.csr_array((2 - cosines[once], (rows[once], columns[once])), shape=(len(A), len(B)))
    # Each feature of the smaller dictionary is paired at no better than its best cosine, and so is each pair's other end.
    pairs = min(len(A), len(B))
    best = [np.sort(found.reshape(-1, CANDIDATES)[:, 0])[::-1][:pairs].mean() for found in (a_cosines, b_cosines)]
    return costs, float(min(best))


def _nearest(A: Tensor, B: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `CANDIDATES` nearest of each feature: whose they are, which they are, their cosines, best first."""
    found = [torch.topk(A[start : start + CHUNK] @ B.T, CANDIDATES, dim=1) for start in range(0, len(A), CHUNK)]
    columns, cosines = (torch.cat([getattr(part, of) for part in found]).flatten().cpu().numpy() for of in ("indices", "values"))
    return np.arange(len(A)).repeat(CANDIDATES), columns, cosines.astype(np.float64)
