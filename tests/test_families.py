import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from helpers import drawn
from sae_stability.matching import families


def by_scipy(W: torch.Tensor, threshold: float) -> np.ndarray:
    """Complete linkage on all features, with those of one seed further apart than any two others."""
    seeds, d_sae, _ = W.shape
    unit = F.normalize(W.double(), dim=2).flatten(0, 1)
    distance = (1 - unit @ unit.T).clamp(min=0).numpy()
    seed = np.arange(seeds).repeat(d_sae)
    distance[seed[:, None] == seed] = 10
    np.fill_diagonal(distance, 0)
    return fcluster(linkage(squareform(distance, checks=False), "complete"), 1 - threshold, "distance")


def as_sets(labels: np.ndarray) -> set[frozenset]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.3, 0.95))
def test_families_are_those_of_scipy_s_complete_linkage(seed, threshold):
    W = drawn(4, 15, 3, seed=seed)
    found = families(W, threshold, torch.ones(4, 15, dtype=torch.bool))
    assert as_sets(found.family.ravel()) == as_sets(by_scipy(W, threshold))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_members_of_a_family_come_from_different_seeds_and_all_reach_the_threshold(seed):
    W = drawn(4, 12, 3, seed=seed)
    alive = torch.rand(4, 12, generator=torch.Generator().manual_seed(seed)) > 0.2
    found = families(W, 0.6, alive)
    unit = F.normalize(W, dim=2)
    np.testing.assert_array_equal(found.family >= 0, alive.numpy())
    for index, (size, smallest) in enumerate(zip(found.size, found.smallest_cosine, strict=True)):
        seeds, features = np.nonzero(found.family == index)
        assert len(seeds) == len(set(seeds)) == size
        members = unit[seeds, features]
        cosines = (members @ members.T)[~torch.eye(size, dtype=torch.bool)]
        if size > 1:
            assert cosines.min().item() == pytest.approx(smallest, abs=1e-6)
            assert smallest >= 0.6
    assert found.size.sum() == alive.sum()


def test_a_chain_of_likenesses_is_not_one_family():
    angles = torch.tensor([0.0, 0.6, 1.2])  # neighbours are near, the ends are not
    W = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None]
    found = families(W, 0.7, torch.ones(3, 1, dtype=torch.bool))
    assert sorted(found.size) == [1, 2]


def test_unique_families_against_seeds_agree_with_enumeration():
    from itertools import combinations

    W = drawn(5, 20, 3)
    found = families(W, 0.8, torch.ones(5, 20, dtype=torch.bool))
    for n in range(1, 6):
        met = [len(np.unique(found.family[list(kept)])) for kept in combinations(range(5), n)]
        assert found.unique()[n - 1] == pytest.approx(np.mean(met))


def test_permuted_copies_are_families_of_all_seeds_even_at_a_threshold_of_one():
    W, generator = drawn(1, 50, 8)[0], torch.Generator().manual_seed(0)
    copies = torch.stack([W[torch.randperm(50, generator=generator)] for _ in range(4)])
    assert families(copies, 1.0, torch.ones(4, 50, dtype=torch.bool)).size.tolist() == [4] * 50


def test_a_permutation_of_features_permutes_the_families():
    W, order = drawn(3, 30, 4), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    alive = torch.ones(3, 30, dtype=torch.bool)
    plain, moved = families(W, 0.7, alive), families(W[:, order], 0.7, alive)
    assert as_sets(plain.family[:, order.numpy()].ravel()) == as_sets(moved.family.ravel())
