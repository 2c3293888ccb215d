from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import NegativeCycleError, bellman_ford

from helpers import drawn
from sae_stability.errors import UserError
from sae_stability.matching import assign, mcc


def cosines(A: torch.Tensor, B: torch.Tensor) -> np.ndarray:
    return (F.normalize(A.double(), dim=1) @ F.normalize(B.double(), dim=1).T).numpy()


def exchange_helps(cosine: np.ndarray, partner: np.ndarray) -> bool:
    """Whether features could swap partners, in whatever circle, and gain: a pairing is the best if and only if none can.

    A circle of swaps that gains is a negative cycle of the graph in which i -> k costs what i loses by taking k's partner.
    """
    size = max(cosine.shape)
    square = np.zeros((size, size))  # those without a partner have one that is like nothing
    square[: len(cosine), : cosine.shape[1]] = cosine
    order = np.full(size, -1)
    order[: len(partner)] = partner
    order[order < 0] = np.setdiff1d(np.arange(size), partner)
    costs = square[np.arange(size), order][:, None] - square[:, order] + 1e-6  # less gain than that is rounding
    try:
        bellman_ford(sparse.csr_array(costs))
    except NegativeCycleError:
        return True
    return False


@settings(max_examples=40)
@given(a=st.integers(1, 6), b=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_a_pairing_is_the_best_of_all(a, b, seed):
    A, B = drawn(a, 3, seed=seed), drawn(b, 3, seed=seed + 1)
    cosine, pairs = cosines(A, B), min(a, b)
    if a <= b:
        all_pairings = (cosine[range(a), list(order)] for order in permutations(range(b), a))
    else:
        all_pairings = (cosine[list(order), range(b)] for order in permutations(range(a), b))
    best = max(pairing.sum() for pairing in all_pairings) / pairs
    found = assign(A, B)
    assert found.mean == pytest.approx(best, abs=1e-6)
    assert mcc(A, B) == found.mean == found.bound
    there = found.partner >= 0
    np.testing.assert_allclose(found.cosine[there], cosine[there, found.partner[there]], atol=1e-6)
    assert there.sum() == pairs


@pytest.mark.parametrize(("rows", "noise"), [*product([40, 60, 75], [0.3, 3.0])])
def test_no_exchange_of_partners_makes_a_pairing_better(rows, noise):
    B = drawn(60, 16, seed=0)
    A = torch.cat([B, drawn(15, 16, seed=1)])[:rows] + noise * drawn(rows, 16, seed=2)
    cosine, found = cosines(A, B), assign(A, B)
    assert not exchange_helps(cosine, found.partner)
    swapped = found.partner.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert exchange_helps(cosine, swapped)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_order_and_length_of_features_do_not_matter(seed, scale):
    A, B = drawn(12, 4, seed=seed), drawn(12, 4, seed=seed + 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert mcc(A[order] * scale, B) == pytest.approx(mcc(A, B), abs=1e-5)
    assert mcc(A, B) == pytest.approx(mcc(B, A), abs=1e-5)
    assert mcc(A, A[order] * scale) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("a", "b"), [(300, 300), (200, 300), (300, 200)])
def test_candidates_come_as_near_to_the_best_pairing_as_the_bound_says(a, b):
    shared = drawn(150, 12, seed=0)
    A = torch.cat([shared, drawn(a - 150, 12, seed=1)])
    B = torch.cat([shared + 0.2 * drawn(150, 12, seed=3), drawn(b - 150, 12, seed=2)])
    exact, sparse = assign(A, B), assign(A, B, exact=10)
    assert sparse.mean <= exact.mean + 1e-6 <= sparse.bound + 2e-6
    assert sparse.mean == pytest.approx(exact.mean, abs=0.005)
    paired = sparse.partner[sparse.partner >= 0]
    assert len(paired) == len(set(paired)) == min(a, b)
    np.testing.assert_array_equal(np.isnan(sparse.cosine), sparse.partner < 0)


def test_features_that_nobody_has_as_a_candidate_are_paired_all_the_same():
    # All of A crowd round one direction of B: most of B is nobody's candidate, and most of A gets none.
    A = torch.eye(1, 8) + 0.01 * drawn(40, 8, seed=0)
    B = torch.cat([torch.eye(1, 8) + 0.01 * drawn(20, 8, seed=1), -torch.eye(1, 8) + 0.01 * drawn(20, 8, seed=2)])
    found = assign(A, B, exact=5)
    assert sorted(found.partner) == list(range(40))


@pytest.mark.parametrize(("A", "B"), [(torch.ones(3, 2), torch.ones(3, 4)), (torch.ones(3, 2), torch.full((3, 2), torch.nan))])
def test_what_can_not_be_paired_is_said(A, B, unchecked):
    with pytest.raises(UserError, match="W_dec"):
        assign(A, B)
