from collections.abc import Set
from itertools import combinations

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import drawn
from sae_stability.matching import Families, families, stability

SEEDS, FEATURES = 4, 15


def crowded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of a space so small that many are alike, and which of them are alive."""
    alive = torch.rand(SEEDS, FEATURES, generator=torch.Generator().manual_seed(seed)) > 0.2
    return drawn(SEEDS, FEATURES, 3, seed=seed), alive


def everything(W: torch.Tensor) -> torch.Tensor:
    return torch.ones(W.shape[:2], dtype=torch.bool)


def cosines(W: torch.Tensor) -> np.ndarray:
    """Of all features with all, numbered over all seeds."""
    unit = F.normalize(W.double(), dim=2).flatten(0, 1)
    return (unit @ unit.T).numpy()


def numbered(medoid: np.ndarray) -> list[int]:
    """Medoids as features numbered over all seeds."""
    return (medoid @ [FEATURES, 1]).tolist()


def best_star(left: Set[int], cosine: np.ndarray, threshold: float, d_sae: int) -> frozenset[int]:
    """The star with most members and then the largest sum of cosines, by looking at all of them."""
    stars = []
    for medoid in left:
        members = []
        for seed in {feature // d_sae for feature in left} - {medoid // d_sae}:
            best = max((feature for feature in left if feature // d_sae == seed), key=lambda feature: cosine[medoid, feature])
            members += [best] if cosine[medoid, best] >= threshold else []
        stars.append((len(members), cosine[medoid, members].sum(), frozenset([medoid, *members])))
    best = max(stars, key=lambda star: star[:2])
    # Where two are as good up to rounding, either may be taken.
    tied = [star for star in stars if star[0] == best[0] > 0 and best[1] - star[1] < 1e-4]
    assume(all(star[2] == best[2] for star in tied))
    return best[2]


def by_brute_force(W: torch.Tensor, threshold: float, alive: torch.Tensor) -> list[frozenset[int]]:
    left, cosine, found = set(np.flatnonzero(alive.numpy())), cosines(W), []
    while left:
        found.append(best_star(left, cosine, threshold, W.shape[1]))
        left -= found[-1]
    return found


def as_sets(found: Families) -> set[frozenset[int]]:
    labels = found.family.ravel()
    return {frozenset(np.flatnonzero(labels == index).tolist()) for index in range(len(found.size))}


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.3, 0.95))
def test_families_are_those_of_brute_force(seed, threshold):
    W, alive = crowded(seed)
    assert as_sets(families(W, threshold, alive)) == set(by_brute_force(W, threshold, alive))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.3, 0.95))
def test_live_features_are_parted_into_families_around_a_medoid_with_one_member_a_seed(seed, threshold):
    W, alive = crowded(seed)
    found = families(W, threshold, alive)
    unit = F.normalize(W, dim=2)
    np.testing.assert_array_equal(found.family >= 0, alive.numpy())
    assert found.size.sum() == alive.sum()
    assert (np.diff(found.size) <= 0).all()
    for index, (size, medoid, mean_cosine) in enumerate(zip(found.size, found.medoid, found.mean_cosine, strict=True)):
        seeds, features = np.nonzero(found.family == index)
        assert len(seeds) == len(set(seeds)) == size
        assert found.family[tuple(medoid)] == index
        others = [place for place in zip(seeds, features, strict=True) if place != tuple(medoid)]
        with_medoid = [float(unit[place] @ unit[tuple(medoid)]) for place in others]
        assert min(with_medoid, default=1) >= threshold - 1e-6
        assert mean_cosine == pytest.approx(np.mean(with_medoid) if others else np.nan, abs=2e-6, nan_ok=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_seeds_and_features_changes_no_family_and_no_medoid(seed):
    W, alive = crowded(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([s * FEATURES + torch.randperm(FEATURES, generator=generator) for s in range(SEEDS)])
    order = order[torch.randperm(SEEDS, generator=generator)]  # [seed, d_sae]: which feature of before stands there now
    plain, moved = families(W, 0.7, alive), families(W.flatten(0, 1)[order], 0.7, alive.flatten()[order])
    before = order.flatten().numpy()
    assert as_sets(plain) == {frozenset(before[list(members)].tolist()) for members in as_sets(moved)}
    assert set(numbered(plain.medoid)) == set(before[numbered(moved.medoid)])


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.3, 0.9))
def test_merging_families_whose_medoids_reach_the_threshold_would_give_them_back(seed, threshold):
    W, alive = crowded(seed)
    found, cosine = families(W, threshold, alive), cosines(W)
    medoids, labels = numbered(found.medoid), found.family.ravel()
    for pair in combinations(range(len(medoids)), 2):
        one, other = pair
        if cosine[medoids[one], medoids[other]] >= threshold:
            before = {frozenset(np.flatnonzero(labels == index).tolist()) for index in pair}
            both = frozenset.union(*before)
            kept = best_star(both, cosine, threshold, FEATURES)
            assert {kept, best_star(both - kept, cosine, threshold, FEATURES)} == before


@pytest.mark.parametrize("shared", [0.74, 0.76])
def test_a_feature_of_every_seed_is_one_family_though_some_of_its_members_are_less_alike(shared):
    """Complete linkage cuts these 60 features, of which almost all reappear, into more than 60 families."""
    directions, noise = F.normalize(drawn(60, 256), dim=1), F.normalize(drawn(24, 60, 256, seed=1), dim=2)
    W = shared**0.5 * directions + (1 - shared) ** 0.5 * noise  # two members have a cosine of `shared` on average
    members = F.normalize(W, dim=2).transpose(0, 1)
    between = (members @ members.mT)[:, ~torch.eye(24, dtype=torch.bool)]
    assert between.mean() == pytest.approx(shared, abs=0.005)
    assert between.min() < 0.7
    found = families(W, 0.7, everything(W))
    assert found.size.tolist() == [24] * 60
    assert all((found.family == found.family[0]).all(0))  # feature i of every seed is in one family


def test_halves_of_a_split_feature_are_two_families_of_every_seed():
    half = torch.tensor([[1.0, 0.4, 0], [1.0, -0.4, 0]])  # a cosine of 0.72
    W = half + 0.01 * drawn(5, 2, 3)
    found = families(W, 0.7, everything(W))
    np.testing.assert_array_equal(found.family, found.family[:1].repeat(5, axis=0))
    assert found.size.tolist() == [5, 5]


def test_a_chain_of_likenesses_is_a_family_only_as_far_as_its_middle_reaches():
    angles = torch.tensor([0.0, 0.6, 1.2, 1.8])  # neighbours reach 0.7, others don't
    W = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None]
    assert families(W[:3], 0.7, everything(W[:3])).size.tolist() == [3]
    assert families(W[:3], 0.7, everything(W[:3])).medoid.tolist() == [[1, 0]]
    assert families(W, 0.7, everything(W)).size.tolist() == [3, 1]


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_the_star_of_a_feature_has_a_member_in_each_seed_in_which_it_reappears(seed):
    W, alive = crowded(seed)
    found, counts = families(W, 0.9, alive), stability(W, 0.9, alive).counts.numpy()
    assert found.size[0] == 1 + counts.max()  # all features are left for the first
    assert (found.size <= 1 + counts[tuple(found.medoid.T)]).all()


def test_unique_families_against_seeds_agree_with_enumeration():
    W = drawn(5, 20, 3)
    found = families(W, 0.8, everything(W))
    for n in range(1, 6):
        met = [len(np.unique(found.family[list(kept)])) for kept in combinations(range(5), n)]
        assert found.unique()[n - 1] == pytest.approx(np.mean(met))


def test_permuted_copies_are_families_of_all_seeds_even_at_a_threshold_of_one():
    W, generator = drawn(1, 50, 8)[0], torch.Generator().manual_seed(0)
    copies = torch.stack([W[torch.randperm(50, generator=generator)] for _ in range(4)])
    assert families(copies, 1.0, everything(copies)).size.tolist() == [4] * 50


def test_features_without_a_like_are_alone_and_without_a_mean_cosine():
    W = torch.eye(6).reshape(3, 2, 6)
    found = families(W, 0.7, torch.tensor([[True, True], [True, False], [True, True]]))
    assert found.size.tolist() == [1] * 5
    assert np.isnan(found.mean_cosine).all()


def test_memory_does_not_grow_with_the_number_of_pairs():
    W, alive = F.normalize(drawn(8, 2048, 24), dim=2), torch.ones(8, 2048, dtype=torch.bool)
    W[1:, :1024] = W[:1, :1024]  # what is kept of every pair lies between what is not
    families(W[:2], 0.7, alive[:2])
    before = psutil.Process().memory_info().rss
    families(W, 0.7, alive)
    assert psutil.Process().memory_info().rss - before < 60e6
