from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sae_stability.errors import UserError
from sae_stability.matching import assign, mcc
from sae_stability.training import train


def drawn(rows: int, d_in: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed))


def independent_mcc(A: torch.Tensor, B: torch.Tensor) -> float:
    """The mean cosine of SciPy's assignment, from NumPy in double precision."""
    A, B = (W.double().numpy() / np.linalg.norm(W.double().numpy(), axis=1, keepdims=True) for W in (A, B))
    cosines = A @ B.T
    rows, columns = linear_sum_assignment(-cosines)
    return cosines[rows, columns].mean()


@pytest.mark.parametrize("seed", range(20))
def test_mcc_agrees_with_scipy_on_random_dictionaries(seed):
    A, B = drawn(60 + seed, 16, seed), drawn(70, 16, 100 + seed)
    assert mcc(A, B) == pytest.approx(independent_mcc(A, B), abs=1e-6)


def test_mcc_agrees_with_scipy_on_trained_dictionaries(cell):
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)).relu()
    W = train(cell.model_copy(update={"tokens": 20_000}), x, range(6)).W_dec
    for one in range(5):
        assert mcc(W[one], W[one + 1]) == pytest.approx(independent_mcc(W[one], W[one + 1]), abs=1e-6)


def test_a_pairing_is_the_best_of_all():
    A, B = drawn(5, 3, 0), drawn(5, 3, 1)
    cosines = F.normalize(A, dim=1) @ F.normalize(B, dim=1).T
    best = max(sum(cosines[i, j].item() for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
    assert assign(A, B).mean == pytest.approx(best, abs=1e-6)
    assert assign(A, B).gap == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_order_and_length_of_features_do_not_matter(seed, scale):
    A, B = drawn(12, 4, seed), drawn(12, 4, seed + 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert mcc(A[order] * scale, B) == pytest.approx(mcc(A, B), abs=1e-5)
    assert mcc(A, B) == pytest.approx(mcc(B, A), abs=1e-5)
    assert mcc(A, A[order] * scale) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("a", "b"), [(300, 300), (200, 300), (300, 200)])
def test_candidates_come_as_near_to_the_best_pairing_as_the_bound_says(a, b):
    shared = drawn(150, 12, 0)
    A = torch.cat([shared, drawn(a - 150, 12, 1)])
    B = torch.cat([shared + 0.2 * drawn(150, 12, 3), drawn(b - 150, 12, 2)])
    exact, sparse = assign(A, B), assign(A, B, exact=10)
    assert sparse.mean <= exact.mean + 1e-6 <= sparse.bound + 2e-6
    assert sparse.mean == pytest.approx(exact.mean, abs=0.005)
    paired = sparse.partner[sparse.partner >= 0]
    assert len(paired) == len(set(paired)) == min(a, b)
    np.testing.assert_array_equal(np.isnan(sparse.cosine), sparse.partner < 0)


def test_features_that_nobody_has_as_a_candidate_are_paired_all_the_same():
    # All of A crowd round one direction of B: most of B is nobody's candidate, and most of A gets none.
    A = torch.eye(1, 8) + 0.01 * drawn(40, 8, 0)
    B = torch.cat([torch.eye(1, 8) + 0.01 * drawn(20, 8, 1), -torch.eye(1, 8) + 0.01 * drawn(20, 8, 2)])
    found = assign(A, B, exact=5)
    assert sorted(found.partner) == list(range(40))


@pytest.mark.parametrize(("A", "B"), [(torch.ones(3, 2), torch.ones(3, 4)), (torch.ones(3, 2), torch.full((3, 2), torch.nan))])
def test_what_can_not_be_paired_is_said(A, B):
    with pytest.raises(UserError, match="W_dec"):
        assign(A, B)
