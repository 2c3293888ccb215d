"""What sets of features span, against dense computations, SciPy, closed forms and planted subspaces."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import sparse
from scipy.linalg import subspace_angles
from sklearn.metrics import adjusted_rand_score

from helpers import drawn
from sae_stability import subspaces
from sae_stability.book import page
from sae_stability.experiments.groups import RANDOM_PARTITIONS
from sae_stability.experiments.subspaces import (
    RANDOM,
    captured,
    ceiling,
    contrast,
    judge_c7,
    of_ceiling,
    random_directions,
    without_strong,
)
from sae_stability.figures import subspaces as figures
from sae_stability.files import save_arrays
from sae_stability.language.activations import Activations
from sae_stability.matching import Stability, stability
from sae_stability.matching.theory import ambiguity_rank
from sae_stability.statistics import jackknife, over_pairs, reach_without
from sae_stability.subspaces import AXES, WRITTEN, Compared, Written, compare, compare_rows, copies, effective_rank, groups
from sae_stability.subspaces.copies import group_cosines, spearman_brown
from sae_stability.subspaces.geometry import captured as captured_along
from sae_stability.subspaces.geometry import chance_of_overlap, overlaps, principal_angles, rank_holding, strongest_axes
from sae_stability.subspaces.sets import band_among, of_bands, of_null
from sae_stability.subspaces.written import sampled_rows

D_IN, TOKENS, PARTS = 32, 4000, 8
RULE = 2  # the rank of D_IN at which rules are judged
WHOLE = {WRITTEN: np.eye(D_IN)}


def random_axes(r: int, seed: int, d_in: int = D_IN) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d_in, r)))[0]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def firing(features: int, seed: int, share: float = 0.2, tokens: int = TOKENS) -> sparse.csr_array:
    """Features that fire on their own, with strengths of one distribution."""
    generator = np.random.default_rng(seed)
    return sparse.csr_array((generator.random((tokens, features)) < share) * generator.exponential(size=(tokens, features)))


def part(tokens: int = TOKENS) -> np.ndarray:
    return np.arange(tokens) % PARTS


def never_matched(seeds: int, features: int) -> Stability:
    """Where every feature of every seed is unstable."""
    best = torch.zeros(seeds, seeds, features)
    best[torch.arange(seeds), torch.arange(seeds)] = torch.nan
    partner = torch.zeros(seeds, seeds, features, dtype=torch.int64)
    return Stability(best, partner, best, torch.ones(seeds, features, dtype=torch.bool), 0.7)


def written_in(bases: list[np.ndarray], features: int = 24) -> list[Written]:
    """Seeds whose features are random directions inside a subspace each."""
    seeds = []
    for seed, basis in enumerate(bases):
        inside = np.random.default_rng(100 + seed).standard_normal((features, basis.shape[1]))
        seeds.append(Written(firing(features, seed), unit(inside @ basis.T), part()))
    return seeds


def mean_of(compared: Compared, key) -> float:
    return compared.interval(lambda value: value, key).value


# Geometry


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_overlaps_and_angles_are_those_of_scipy(r, seed):
    one, other = random_axes(r, seed), random_axes(r, seed + 1)
    angles = subspace_angles(one, other)  # from the largest on
    assert principal_angles(one, other) == pytest.approx(np.degrees(angles[::-1]), abs=1e-5)
    for first in range(1, r + 1):
        expected = np.square(np.cos(subspace_angles(one[:, :first], other[:, :first]))).mean()
        assert overlaps(one, other)[first - 1] == pytest.approx(expected)


def test_random_subspaces_overlap_by_chance_alone():
    r, drawn_overlaps = 8, []
    for seed in range(2000):
        drawn_overlaps.append(overlaps(random_axes(r, 2 * seed), random_axes(r, 2 * seed + 1))[-1])
    mean, spread = chance_of_overlap(r, D_IN)
    assert mean == r / D_IN
    assert np.mean(drawn_overlaps) == pytest.approx(mean, abs=4 * spread / 2000**0.5)
    assert np.std(drawn_overlaps) == pytest.approx(spread, rel=0.08)


def test_the_rank_at_a_share_of_the_energy_counts_axes_and_the_part_of_the_last():
    assert rank_holding(np.array([1.0, 1, 1, 1, 0]), 0.5) == pytest.approx(2)
    assert rank_holding(np.array([6.0, 4]), 0.8) == pytest.approx(1.5)
    assert rank_holding(np.array([10.0, 0]), 0.9) == pytest.approx(0.9)
    assert np.isnan(rank_holding(np.zeros(3)))


def test_what_lies_along_axes_is_a_share_of_the_whole():
    covariance = np.diag([4.0, 3, 2, 1])
    assert captured_along(covariance, np.eye(4)[:, [0, 3]]) == pytest.approx([0.4, 0.5])
    assert np.isnan(captured_along(np.zeros((4, 4)), np.eye(4))).all()


def test_the_effective_rank_of_orthogonal_rows_is_their_number_and_of_equal_ones_is_one():
    assert effective_rank(3 * torch.linalg.qr(drawn(9, 9))[0][:5]) == pytest.approx(5)
    assert effective_rank(drawn(1, 9).expand(4, 9)) == pytest.approx(1)
    assert np.isnan(effective_rank(drawn(0, 9)))
    two = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=1)
    values = np.sqrt([1.6, 0.4])
    shares = values / values.sum()
    assert effective_rank(two) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_strong_axes_are_projected_out_and_no_others():
    axes = random_axes(D_IN, 0)
    variances = np.r_[30.0, 20, np.full(D_IN - 2, 1.0)]  # 2 % each of the rest
    projection = without_strong(axes @ np.diag(variances) @ axes.T)
    assert projection @ axes[:, :2] == pytest.approx(0, abs=1e-9)
    assert projection @ axes[:, 2:] == pytest.approx(axes[:, 2:])


# What a set writes


@pytest.mark.parametrize("whole", [0, 1 << 27])  # products are made for a set, or taken from those of all features
@pytest.mark.parametrize("count", [5, 30])  # few features in their own dimensions, and many in all
def test_moments_are_those_of_what_is_written(count, whole, monkeypatch):
    monkeypatch.setattr("sae_stability.subspaces.written.WHOLE", whole)
    codes, directions = firing(40, 0), unit(drawn(40, D_IN).numpy().astype(float))
    members, chosen = np.arange(3, 3 + count), np.array([0, 2, 6])
    moments = Written(codes, directions, part()).moments(members)
    dense = (codes.toarray()[:, members] @ directions[members])[np.isin(part(), chosen)]
    expected = np.cov(dense.T, bias=True)
    assert moments.covariance(chosen) == pytest.approx(expected)
    axes, energies = moments.strongest_axes(chosen)
    assert energies[:5] == pytest.approx(np.linalg.eigvalsh(expected)[::-1][:5])
    assert axes[:, :5].T @ expected @ axes[:, :5] == pytest.approx(np.diag(energies[:5]), abs=1e-9)
    turned = random_axes(D_IN, 3)
    assert moments.mapped(turned).covariance(chosen) == pytest.approx(turned.T @ expected @ turned)


def test_other_directions_keep_energies_and_fire_alone():
    codes, directions = firing(6, 0), unit(drawn(6, D_IN, seed=1).numpy().astype(float))
    tied = sparse.csr_array(codes.toarray()[:, [0, 0, 1, 2, 3, 4]])  # two always fire together
    alone = Written(tied, np.eye(6, D_IN), part()).alone_in(directions)
    members, chosen = np.arange(6), np.arange(PARTS)
    within = np.stack([np.cov(tied.toarray()[part() == number].T, bias=True) for number in range(PARTS)]).mean(0)
    expected = directions.T @ np.diag(np.diag(within)) @ directions
    assert alone.moments(members).covariance(chosen) == pytest.approx(expected)


def test_random_directions_are_of_the_covariance_and_no_two_seeds_have_the_same():
    stretch = torch.linspace(0.1, 3, D_IN)
    held_out = Activations.of(drawn(5000, D_IN, seed=0) * stretch + 7)
    members = [Written(firing(400, seed), np.eye(400, D_IN), part()) for seed in range(2)]
    first, second = random_directions({3: members[0], 8: members[1]}, held_out)
    (alone,) = random_directions({8: members[0]}, held_out)  # whichever its place among seeds
    np.testing.assert_array_equal(alone.directions, second.directions)
    np.testing.assert_array_equal(alone.energy, members[0].energy)
    assert np.abs(first.directions - second.directions).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(first.directions, axis=1), 1)
    assert np.corrcoef(np.square(first.directions).mean(0), stretch.numpy() ** 2)[0, 1] > 0.99


def test_energies_and_firings_are_those_of_the_codes():
    codes = firing(10, 0)
    written = Written(codes, np.eye(10, D_IN), part())
    assert written.energy == pytest.approx(np.square(codes.toarray()).mean(0))
    assert (written.firings == (codes.toarray() > 0).sum(0)).all()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_each_cluster_lies_in_one_part(clusters):
    cluster = np.array(clusters)
    parts = subspaces.parts_of(cluster)
    assert len(set(zip(cluster, parts, strict=True))) == len(set(clusters))
    assert set(parts) == set(range(min(8, len(set(clusters)))))


# Which sets


def stable_and_own(seeds: int = 5, shared: int = 12, own: int = 6) -> torch.Tensor:
    """Directions at right angles: some of all seeds, some of each one's own."""
    axes = torch.linalg.qr(drawn(64, 64))[0]
    return torch.stack([torch.cat([axes[:shared], axes[shared + own * seed : shared + own * (seed + 1)]]) for seed in range(seeds)])


def test_bands_of_a_pair_come_from_the_other_seeds():
    directions = stable_and_own()
    directions[1, 12] = directions[0, 12]  # only the first two have it
    found = stability(directions)
    assert band_among(found, 0, frozenset())[12] == 1
    assert band_among(found, 0, frozenset({1}))[12] == 2
    assert band_among(found, 0, frozenset({2}))[12] == 1
    assert (band_among(found, 0, frozenset({1, 2, 3, 4})) == -1).all()  # nobody is left


def test_matches_are_as_energetic_and_as_frequent():
    directions, seeds = stable_and_own(), []
    strengths = np.r_[np.linspace(1, 2, 12), np.linspace(1.5, 9, 6)]  # only the first unstable feature has a match
    for seed in range(5):
        fires = (np.arange(TOKENS)[:, None] + np.arange(18)) % 10 == 0  # each as often
        seeds.append(Written(sparse.csr_array(fires * strengths), directions[seed].numpy(), part()))
    sets = of_bands(stability(directions), seeds)(0, frozenset({1}))
    assert set(sets["unstable"]) == set(range(12, 18))
    assert len(sets["paired"]) == len(sets["matched"]) > 0
    assert set(sets["paired"]) <= {12}
    assert set(sets["matched"]) <= set(range(12))
    assert len(sets["random"]) == 6
    assert not len(sets["intermediate"])
    energies = seeds[0].energy
    spread = np.log(energies).std()
    assert np.log(energies[sets["paired"]]) == pytest.approx(np.log(energies[sets["matched"]]), abs=0.05 * spread)


def test_a_null_gives_as_many_features_and_those_that_are_most_alike():
    model, null = stable_and_own(), stable_and_own(seeds=3, shared=0, own=18)
    of_model, of_null_ones = np.r_[np.ones(12), 3, 4, 5, 6, 7, 8], np.arange(1.0, 19)

    def seeds(dictionaries: torch.Tensor, strengths: np.ndarray) -> list[Written]:
        codes = sparse.csr_array(((np.arange(TOKENS)[:, None] + np.arange(18)) % 10 == 0) * strengths)  # each fires as often
        return [Written(codes, each.numpy(), part()) for each in dictionaries]

    real, other = seeds(model, of_model), seeds(null, of_null_ones)
    sets = of_null(stability(null), other, real, stability(model))(1, frozenset({0}))
    assert len(sets["all"]) == 18
    assert len(sets["as many"]) == len(of_bands(stability(model), real)(1, frozenset({2}))["unstable"]) == 6
    assert sorted(sets["alike"]) == [2, 3, 4, 5, 6, 7]  # of strengths 3 to 8


# Pairs of seeds


def test_a_planted_shared_subspace_is_found_and_planted_disjoint_ones_are_not():
    shared = [random_axes(RULE, 0)] * 4
    together = compare(written_in(shared), of_bands(never_matched(4, 24), written_in(shared)), WHOLE, np.eye(D_IN), "")
    assert mean_of(together, ("overlap", WRITTEN, "unstable", "unstable", str(RULE))) == pytest.approx(1)
    assert mean_of(together, captured("unstable", "unstable", RULE)) == pytest.approx(1)
    assert mean_of(together, ("angle", WRITTEN, "unstable", "unstable", str(RULE))) == pytest.approx(0, abs=1e-4)
    assert 1 < mean_of(together, ("rank", WRITTEN, "unstable")) < 2
    axes = random_axes(D_IN, 1)
    apart = written_in([axes[:, 4 * seed : 4 * seed + 4] for seed in range(4)])
    disjoint = compare(apart, of_bands(never_matched(4, 24), apart), WHOLE, np.eye(D_IN), "")
    assert mean_of(disjoint, captured("unstable", "unstable", 4)) == pytest.approx(0, abs=1e-9)
    assert mean_of(disjoint, ceiling("unstable", 4)) == pytest.approx(1)
    assert mean_of(disjoint, ("angle", WRITTEN, "unstable", "unstable", str(RULE))) == pytest.approx(90)


def test_isotropic_noise_overlaps_by_chance_within_its_interval():
    seeds = written_in([np.eye(D_IN)] * 6, features=64)
    compared = compare(seeds, of_bands(never_matched(6, 64), seeds), WHOLE, np.eye(D_IN), "")
    for r in (2, 4, 8):
        found = compared.interval(lambda value: value, ("overlap", WRITTEN, "unstable", "unstable", str(r)))
        assert found.low < r / D_IN < found.high
        assert found.high - found.low < 0.2


def test_the_seeds_of_a_pair_are_read_on_disjoint_documents():
    seeds = written_in([np.eye(D_IN)] * 3)
    compared = compare(seeds, of_bands(never_matched(3, 24), seeds), WHOLE, np.eye(D_IN), "")
    first, second = ([number for number in range(PARTS) if number % 2 == half] for half in (0, 1))
    members = np.arange(24)
    one, other = (seeds[seed].moments(members).covariance(np.array(half)) for seed, half in ((0, first), (1, second)))
    expected = captured_along(one, strongest_axes(other)[0])[RULE - 1]
    assert compared.values[captured("unstable", "unstable", RULE)][-1, 0, 1] == pytest.approx(expected)
    own = strongest_axes(seeds[0].moments(members).covariance(np.array(second)))[0]
    assert compared.values[ceiling("unstable", RULE)][-1, 0, 1] == pytest.approx(captured_along(one, own)[RULE - 1])
    without = seeds[1].moments(members).covariance(np.array(second[1:]))
    expected = captured_along(one, strongest_axes(without)[0])[RULE - 1]
    assert compared.without_part[captured("unstable", "unstable", RULE)][second[0], 0, 1] == pytest.approx(expected)


def dictionaries(seeds: int = 5) -> tuple[torch.Tensor, list[sparse.csr_array]]:
    """Decoders with features of all seeds, and others of each one's own in a common subspace of 12 dimensions."""
    basis, common = torch.from_numpy(random_axes(12, 0)).float(), F.normalize(drawn(20, D_IN), dim=1)
    own = [F.normalize(drawn(20, 12, seed=1 + seed) @ basis.T, dim=1) for seed in range(seeds)]
    return torch.stack([torch.cat([common, each]) for each in own]), [firing(40, seed) for seed in range(seeds)]


def compared_of(W_dec: torch.Tensor, codes: list[sparse.csr_array], covariance: np.ndarray | None = None) -> Compared:
    seeds = [Written(each, directions.double().numpy(), part()) for each, directions in zip(codes, W_dec, strict=True)]
    return compare(seeds, of_bands(stability(W_dec), seeds), WHOLE, np.eye(D_IN) if covariance is None else covariance, "")


def test_neither_a_rotation_of_the_space_nor_an_order_of_the_features_matters():
    W_dec, codes = dictionaries()
    order, turned = torch.randperm(40, generator=torch.Generator().manual_seed(0)), torch.from_numpy(random_axes(D_IN, 5)).float()
    strong = np.diag(np.arange(1.0, D_IN + 1))
    rotated_axes = turned.numpy().T.astype(float) @ strong @ turned.numpy().astype(float)
    before = compared_of(W_dec, codes, strong)
    after = compared_of((W_dec @ turned)[:, order], [each[:, order.numpy()] for each in codes], rotated_axes)
    for key, values in before.values.items():
        if "random" not in key:  # which features are drawn depends on their order
            np.testing.assert_allclose(after.values[key], values, rtol=1e-3, atol=1e-4, err_msg=str(key))


def test_without_a_seed_all_is_as_if_it_had_not_been_there():
    W_dec, codes = dictionaries()
    whole = compared_of(W_dec, codes)
    seeds = [Written(each, directions.double().numpy(), part()) for each, directions in zip(codes, W_dec, strict=True)]
    fewer = compare(seeds[:4], of_bands(stability(W_dec).among([0, 1, 2, 3]), seeds[:4]), WHOLE, np.eye(D_IN), "")
    for key in (captured("unstable", "unstable", RULE), ("rank", WRITTEN, "unstable"), ("correlation", "unstable")):
        np.testing.assert_allclose(whole.values[key][4][:4, :4], fewer.values[key][-1])


def test_intervals_are_jackknifed_over_seeds_and_widened_by_the_text():
    generator, key = np.random.default_rng(0), ("captured", WRITTEN, "unstable", "unstable", "2")
    values = generator.random((5, 4, 4))  # of four seeds, with what all give in the last place
    for left_out, found in enumerate(values):
        found[np.eye(4, dtype=bool)] = np.nan
        if left_out < 4:
            found[left_out], found[:, left_out] = np.nan, np.nan
    ours = Compared({key: values}, {}).interval(lambda mean: 2 * mean, key)
    expected = jackknife(lambda kept: 2 * np.nanmean(values[-1] if len(kept) == 4 else values[({*range(4)} - {*kept}).pop()]), 4)
    assert (ours.value, ours.low, ours.high) == pytest.approx((expected.value, expected.low, expected.high))
    parts = values[-1] + generator.normal(size=(PARTS, 1, 1))
    wider = Compared({key: values}, {key: parts}).interval(lambda mean: 2 * mean, key)
    text = reach_without([2 * np.nanmean(each) for each in parts])
    assert (wider.high - wider.value) ** 2 == pytest.approx((ours.high - ours.value) ** 2 + text**2)


def test_a_file_holds_all_that_was_compared(tmp_path):
    found = compared_of(*dictionaries(3))
    save_arrays(tmp_path / "found.safetensors", found.arrays())
    again = Compared.of(load_file(tmp_path / "found.safetensors"))
    for one, other in ((found.values, again.values), (found.without_part, again.without_part)):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


@pytest.mark.parametrize(("parts", "known"), [(1, False), (2, False), (3, False), (4, True)])
def test_a_text_of_few_parts_tells_no_interval_and_one_of_a_single_part_nothing(parts, known):
    W_dec, codes = dictionaries()
    few = [Written(each, directions.double().numpy(), part() % parts) for each, directions in zip(codes, W_dec, strict=True)]
    found = compare(few, of_bands(stability(W_dec), few), WHOLE, np.eye(D_IN), "")
    interval = found.interval(lambda value: value, captured("unstable", "unstable", RULE))
    assert np.isfinite(interval.value) == (parts > 1)
    assert np.isfinite(interval.low) == known


def test_everything_that_is_read_on_text_is_read_without_each_part():
    W_dec, codes = dictionaries()
    seeds = [Written(each, directions.double().numpy(), part()) for each, directions in zip(codes, W_dec, strict=True)]
    turned = {**WHOLE, "turned": random_axes(D_IN, 7)}
    found = compare(seeds, of_bands(stability(W_dec), seeds), turned, np.eye(D_IN), "")
    counted = {key for key in found.values if key[0] in ("features", "energy", "frequency")}
    assert found.without_part.keys() == found.values.keys() - counted
    first_part = np.concatenate([np.arange(TOKENS)[part() == number][::20] for number in range(PARTS)])
    kept = part()[first_part] != 3
    sets = (
        of_bands(stability(W_dec), seeds)(0, frozenset({1}))["unstable"],
        of_bands(stability(W_dec), seeds)(1, frozenset({0}))["unstable"],
    )
    one, other = (seeds[seed].on_sample(members)[kept] for seed, members in enumerate(sets))
    expected = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    assert found.without_part["correlation", "unstable"][3, 0, 1] == pytest.approx(expected)


# Decoder rows


def test_a_regression_on_the_rows_of_one_seed_tells_those_of_another():
    generator = np.random.default_rng(0)
    stable = np.abs(generator.standard_normal((1, 40, D_IN))) * np.r_[np.ones(16), np.full(16, 0.1)]
    own = np.abs(generator.standard_normal((5, 40, D_IN))) * np.r_[np.full(16, 0.1), np.ones(16)]
    directions = np.concatenate([np.repeat(stable, 5, 0), own], 1)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    found = never_matched(5, 80)
    found.best_cosine[:, :, :40] = torch.where(found.best_cosine[:, :, :40].isnan(), torch.nan, 1.0)
    compared = compare_rows(directions, found, "")
    assert mean_of(compared, ("F1", "told")) > 0.99
    assert mean_of(compared, ("ROC", "told")) > 0.999
    assert 0.2 < mean_of(compared, ("ROC", "rotated")) < 0.8
    one = compared.values["effective rank over d", "unstable"][-1, 0, 1]
    assert one == pytest.approx(effective_rank(torch.from_numpy(directions[0, 40:])) / D_IN)
    rows = directions[0, 40:]
    within = captured_along(rows.T @ rows, strongest_axes(directions[1, 40:].T @ directions[1, 40:])[0])
    assert compared.values["captured", "unstable", "unstable", "4"][-1, 0, 1] == pytest.approx(within[3])


# Noise or ambiguity


def test_means_of_noisy_copies_come_closer_as_spearman_and_brown_say():
    common = F.normalize(drawn(300, 256), dim=1)
    noisy = torch.stack([F.normalize(common + 1.2 * drawn(300, 256, seed=1 + seed) / 16, dim=1) for seed in range(8)])
    found = stability(noisy)
    single, several = (group_cosines(F.normalize(noisy, dim=2), found, size) for size in (1, 4))
    assert np.nanmean(several) == pytest.approx(np.nanmean(spearman_brown(single, 4)), abs=0.02)
    assert np.nanmean(several) > np.nanmean(single) + 0.25


def test_means_of_rotations_of_a_block_do_not():
    blocks = torch.from_numpy(random_axes(12, 0)).float()
    rotated = torch.stack([F.normalize(drawn(24, 12, seed=seed), dim=1) @ blocks.T for seed in range(8)])
    found = stability(rotated)
    single, several = (float(np.nanmean(group_cosines(rotated, found, size))) for size in (1, 4))
    assert spearman_brown(np.array([single]), 4) > 0.8
    assert several < single + 0.05


def test_groups_share_no_seed_and_are_built_around_the_partner():
    W = F.normalize(drawn(5, 9, 6), dim=2)
    found = stability(W)
    s, t, i = 1, 3, 4
    j = int(found.partner[s, t, i])
    one = W[s, i] + W[4, found.partner[s, 4, i]]  # the seeds after t, in turn: 4 to s, 0 to t
    other = W[t, j] + W[0, found.partner[t, 0, j]]
    expected = float(F.cosine_similarity(one, other, dim=0))
    assert group_cosines(W, found, 2)[s, t, i] == pytest.approx(expected, abs=1e-6)
    assert group_cosines(W, found, 1)[s, t, i] == pytest.approx(float(found.best_cosine[s, t, i]), abs=1e-6)


def test_copies_are_tabled_by_band_with_what_is_predicted():
    directions = stable_and_own()
    table = copies(directions, stability(directions), [0, 1, 2, 3]).set_index(["band", "size"])
    assert table.loc[("stable", 2), "cosine"] == pytest.approx(1)
    assert table.loc[("stable", 2), "share"] == 1
    single = table.loc[("unstable", 1), "cosine"]
    assert table.loc[("unstable", 2), "predicted"] == pytest.approx(2 * single / (1 + single), abs=1e-6)
    assert table.loc[("intermediate", 1)].drop(["share"]).isna().all()


def test_copies_are_as_many_as_two_groups_without_a_common_seed_allow_and_their_bands_are_the_other_seeds():
    directions = stable_and_own()
    for seeds, sizes in ((5, {1, 2}), (4, {1, 2}), (3, {1}), (2, set())):
        assert set(copies(directions, stability(directions), list(range(seeds)))["size"]) == sizes
    directions[1, 12] = directions[0, 12]  # only the first two have it: unstable where one of them is judged by the rest
    table = copies(directions, stability(directions), [0, 1, 2, 3, 4]).set_index(["band", "size"])
    assert table.loc[("unstable", 1), "share"] == pytest.approx(2 / (2 * 4 * 6 - 6 + 3 * 4 * 6), abs=0.02)


def test_bands_of_copies_allow_as_many_misses_without_a_seed_as_with_all():
    """Eleven seeds, of which each lacks one feature that all others have: with a miss of ten allowed, all are stable."""
    directions = F.normalize(drawn(11, 64), dim=1).repeat(11, 1, 1)
    for seed in range(11):
        directions[seed, seed] = F.normalize(drawn(64, seed=1 + seed), dim=0)
    found = stability(directions)
    for kept in (list(range(11)), list(range(10))):
        table = copies(directions, found, kept).set_index(["band", "size"])
        assert np.isnan(table.loc[("intermediate", 1), "cosine"])
        assert table.loc[("stable", 1), "share"] < 1  # a miss is one of the pairs


# Local structure


def blocks(seeds: int = 6, count: int = 3, r: int = 8) -> tuple[list[Written], list[np.ndarray], np.ndarray]:
    """Seeds that write the same blocks, each along axes of its own; what each leaves; and the block of each feature."""
    spaces, generator = random_axes(count * r, 0).T.reshape(count, r, D_IN), np.random.default_rng(1)
    inside = generator.standard_normal((TOKENS, count, r)) * (generator.random((TOKENS, count, 1)) < 0.2)
    seeds_written, of_block = [], np.repeat(np.arange(count), 2 * r)
    for seed in range(seeds):
        axes = [np.vstack([random_axes(r, 10 * seed + block, r).T] * 2) for block in range(count)]
        axes = [np.vstack([each[:r], -each[r:]]) for each in axes]  # both ways along each axis: codes are not negative
        codes = np.concatenate([np.maximum(inside[:, block] @ axes[block].T, 0) for block in range(count)], 1)
        directions = np.concatenate([axes[block] @ spaces[block] for block in range(count)])
        seeds_written.append(Written(sparse.csr_array(codes), directions, part()))
    noise = np.random.default_rng(3).standard_normal((len(sampled_rows(part())), D_IN)) * 0.01
    return seeds_written, [noise] * seeds, of_block


def judged(ensemble, random_partitions=1):
    """Groups of every other seed, judged on the rest."""
    return groups.judge_groups(ensemble, groups.find_groups(ensemble, [0, 2, 4]), [1, 3, 5], "", random_partitions)


def test_planted_blocks_are_found_as_groups_that_come_back_and_can_be_swapped():
    written, errors, of_block = blocks()
    members = [np.arange(48)] * 6
    label = groups.clustered(np.concatenate([written[seed].directions for seed in (0, 2, 4)]), 3)
    assert adjusted_rand_score(np.tile(of_block, 3), label) == 1
    found = judged(groups.Ensemble(written, errors, members)).groupby("partition").mean()
    assert found.loc["clustered", "share"] == pytest.approx(1, abs=0.01)
    assert found.loc["clustered", "swapped"] == pytest.approx(1, abs=0.01)
    assert found.loc["clustered", "rank"] <= 8
    assert found.loc["random", "share"] < 0.9
    assert found.loc["random", "swapped"] < 0.5


def test_groups_part_the_unstable_features_of_the_seeds_that_they_are_found_on():
    written, errors, _ = blocks()
    members = [np.arange(0, 48, 2)] * 6
    found = groups.find_groups(groups.Ensemble(written, errors, members), [0, 2, 4])
    assert found.groupby("seed")["feature"].apply(list).to_dict() == {seed: members[seed].tolist() for seed in (0, 2, 4)}
    assert len(found) == 3 * 24
    assert found["group"].nunique() == 2  # of `SIZE` features of a seed each


def test_random_partitions_are_as_large_as_the_clustered_one_and_many():
    written, errors, _ = blocks()
    found = judged(groups.Ensemble(written, errors, [np.arange(48)] * 6), 5)
    places = found.groupby("partition")["group"].nunique()
    assert places["random"] == 5 * places["clustered"]
    assert found.groupby(["partition", "group"]).size().eq(3).all()
    sizes = found.groupby("partition")["features"].mean()
    assert sizes["random"] == pytest.approx(sizes["clustered"])


def test_groups_are_compared_with_random_ones_of_their_size_and_their_number_is_corrected_for():
    """Random groups of the size of group i have a share of i / 20 and a spread of 0.01."""
    count, draws = 11, RANDOM_PARTITIONS
    rng = np.random.default_rng(0)
    random = [
        {"partition": "random", "group": count * (1 + draw) + like, "like": like, "share": like / 20 + 0.01 * rng.normal()}
        for draw in range(draws)
        for like in range(count)
    ]

    def counted(**more: float) -> int:
        clustered = [
            {"partition": "clustered", "group": like, "like": like, "share": like / 20 + more.get(f"_{like}", 0.0)}
            for like in range(count)
        ]
        return groups.beyond_random(pd.DataFrame(clustered + random))

    assert counted() == 0
    assert counted(_3=0.1) == 1  # though most random groups, of larger sizes, capture more
    assert counted(_3=0.1, _9=0.1) == 2
    assert counted(_3=0.021) == 0  # two standard deviations are nothing among eleven
    assert counted(_3=-0.1) == 0


def test_of_planted_planes_one_is_drawn_whole():
    generator, planes = np.random.default_rng(0), random_axes(10, 0).T.reshape(5, 2, D_IN)
    directions = []
    for _ in range(4):
        turns = generator.uniform(0, np.pi, 5)
        axes = np.array([[[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] for turn in turns])
        directions.append(np.concatenate([axes @ planes, -axes @ planes], 1).reshape(20, D_IN))
    found = groups.planar_group(directions, [np.arange(100, 120)] * 4)
    assert found.groupby("seed").size().tolist() == [4] * 4
    assert ((found["feature"] - 100) // 4).nunique() == 1  # of one plane
    assert np.hypot(found["x"], found["y"]).to_numpy() == pytest.approx(1, abs=1e-6)
    assert groups.planar_group([rows[:3] for rows in directions], [np.arange(3)] * 4).empty


def in_plane(angles):
    return np.cos(angles), np.sin(angles), np.repeat(np.arange(len(angles) // 4), 4)


def test_axes_that_only_a_turn_tells_apart_are_turned_onto_one_another():
    # Four directions at uneven angles, in four seeds: only their own turn lays all of them on those of the first seed.
    shape, turns = np.radians([0, 70, 170, 250]), np.radians([0, 33, 118, 290])
    x, y, owner = in_plane(np.concatenate([shape + turn for turn in turns]))
    found = groups.turned_onto(2 * x, 2 * y, owner)
    assert found.loc[:3].isna().all(axis=None)  # nothing to be turned onto
    assert found["after"][4:].to_numpy() == pytest.approx(1)
    assert np.hypot(found["turned_x"], found["turned_y"])[4:].to_numpy() == pytest.approx(2)
    assert found["turned_x"][4:].to_numpy() == pytest.approx(np.tile(2 * np.cos(shape), 3))
    before = [np.cos(angle + turn - shape).max() for turn in turns[1:] for angle in shape]
    assert found["before"][4:].to_numpy() == pytest.approx(before)
    assert found["by_chance"][4:].max() < 0.9


def test_directions_at_random_come_as_near_as_chance_brings_them():
    # A direction has no part in the angle by which it is turned, so that angle can't be learned where there is none.
    draw = np.random.default_rng(5)
    after, by_chance = np.transpose(
        [groups.turned_onto(*in_plane(draw.uniform(0, 2 * np.pi, 8)))[["after", "by_chance"]].mean() for _ in range(30)]
    )
    assert after.mean() == pytest.approx(by_chance.mean(), abs=0.06)
    alone = groups.turned_onto(np.ones(5), np.ones(5), np.array([0, 0, 0, 1, 1]))
    assert alone.isna().all(axis=None)  # one other fits anywhere
    assert groups.turned_onto(np.zeros(0), np.zeros(0), np.zeros(0, dtype=int)).empty


def test_groups_of_each_seeds_own_do_not_come_back():
    seeds = written_in([random_axes(4, seed) for seed in range(6)], features=16)
    errors = [np.zeros((len(sampled_rows(part())), D_IN))] * 6
    found = judged(groups.Ensemble(seeds, errors, [np.arange(16)] * 6))
    assert found["share"].max() < 0.5
    assert found["swapped"].abs().max() < 0.3


def test_few_unstable_features_or_one_part_of_text_make_no_groups():
    written, errors, _ = blocks()
    for members in ([np.arange(48)] * 5 + [np.arange(15)], [np.arange(0)] * 6):
        assert judged(groups.Ensemble(written, errors, members)).empty
    one_part = [Written(sparse.csr_array(each.parts[0]), each.directions, np.zeros(each.tokens[0], dtype=int)) for each in written]
    assert judged(groups.Ensemble(one_part, errors, [np.arange(48)] * 6)).empty


@pytest.mark.parametrize("r", [4, 8, 12, 20])
def test_the_ambiguity_rank_inverts_the_theory(r):
    one, other = (
        unit(np.random.default_rng(0).standard_normal((2000, r))),
        np.random.default_rng(1).standard_normal((2000, 2 * r, r)),
    )
    best = np.einsum("nr,nlr->nl", one, other / np.linalg.norm(other, axis=2, keepdims=True)).max(1)
    assert ambiguity_rank(float(np.median(best))) == pytest.approx(r, rel=0.08)
    assert ambiguity_rank(1.0) == 2
    assert ambiguity_rank(0.0) == np.inf


# The rule


def planted(**means: float) -> Compared:
    """What was compared of four seeds, the same in all pairs, by names of keys."""
    keys = {
        "uu": captured("unstable", "unstable", RULE),
        "u": ceiling("unstable", RULE),
        "axes": captured("unstable", AXES, RULE),
        "rr": captured(RANDOM, RANDOM, RULE),
        "r": ceiling(RANDOM, RULE),
        "aa": captured("alike", "alike", RULE),
        "a": ceiling("alike", RULE),
        "pp": captured("paired", "paired", RULE),
        "pm": captured("paired", "matched", RULE),
        "mp": captured("matched", "paired", RULE),
        "mm": captured("matched", "matched", RULE),
        "rank_p": ("rank", WRITTEN, "paired"),
        "rank_m": ("rank", WRITTEN, "matched"),
        "stable": ("effective rank over d", "stable"),
        "unstable": ("effective rank over d", "unstable"),
    }
    generator = np.random.default_rng(0)
    return Compared({keys[name]: mean + 1e-4 * generator.random((5, 4, 4)) for name, mean in means.items()}, {})


SUPPORTED = {"uu": 0.4, "u": 0.6, "axes": 0.2, "rr": 0.2, "r": 0.6, "pp": 0.4, "pm": 0.1, "mp": 0.1, "mm": 0.4}
SUPPORTED |= {"rank_p": 20, "rank_m": 30}


@pytest.mark.parametrize(
    ("changed", "verdicts"),
    [
        ({}, ["supported", "supported", "supported"]),
        ({"uu": 0.25}, ["weaker than the bound", "supported", "supported"]),
        ({"uu": 0.02}, ["opposite", "opposite", "supported"]),
        ({"stable": 0.4}, ["opposite", "supported", "supported"]),
        ({"aa": 0.5}, ["supported", "opposite", "supported"]),
        ({"rr": 0.5}, ["supported", "opposite", "supported"]),
        ({"axes": 0.5}, ["supported", "opposite", "supported"]),
        ({"pm": 0.5, "mp": 0.5}, ["supported", "supported", "opposite"]),
        ({"rank_p": 40}, ["supported", "supported", "opposite"]),
    ],
)
def test_each_condition_of_c7_counts(changed, verdicts):
    values = {**SUPPORTED, "stable": 0.6, "unstable": 0.5, "aa": 0.2, "a": 0.6, **changed}
    model = planted(**{name: value for name, value in values.items() if name in SUPPORTED})
    rows, noise = planted(stable=values["stable"], unstable=values["unstable"]), planted(aa=values["aa"], a=values["a"])
    lines = judge_c7(model, rows, noise, D_IN)
    assert [line["verdict"] for line in lines] == verdicts
    assert lines[0]["value"] == pytest.approx(values["uu"] / values["u"], abs=1e-3)
    assert lines[0]["null"] == pytest.approx(values["aa"] / values["a"], abs=1e-3)
    assert lines[2]["value"] == pytest.approx(values["pp"] - values["mp"] - values["pm"] + values["mm"], abs=1e-3)


def test_a_set_that_is_too_small_makes_c7_inconclusive():
    lines = judge_c7(planted(uu=0.4, u=0.6), planted(stable=0.6, unstable=0.5), planted(), D_IN)
    assert [line["verdict"] for line in lines] == ["supported", "inconclusive", "inconclusive"]


def test_what_is_captured_is_a_share_of_its_ceiling():
    found = planted(uu=0.3, u=0.6, pp=0.5, pm=0.1, mp=0.2, mm=0.4)
    assert of_ceiling(found, "unstable", RULE).value == pytest.approx(0.5, abs=1e-3)
    assert contrast(found, RULE).value == pytest.approx(0.6, abs=1e-3)
    values = found.values[captured("unstable", "unstable", RULE)]
    assert mean_of(found, captured("unstable", "unstable", RULE)) == pytest.approx(over_pairs(values[-1]).value)


# Figures and pages


def test_figures_draw_what_was_found():
    curve = pd.DataFrame({"rank": [8, 4], "value": [0.6, 0.5], "value_low": [0.5, np.nan], "value_high": [0.7, np.nan]})
    unknown = curve.assign(value=float("nan"))  # where seeds are too few
    (axis,) = figures.shared_subspaces({"unstable": curve, "lost": unknown, "noise": curve.assign(value=[0.2, 0.1])}, "title").axes
    assert [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() != "None"] == [[0.5, 0.6], [0.1, 0.2]]
    four = pd.DataFrame({"of": ["paired", "matched"], "by": "paired", "value": [0.3, 0.1], "value_low": 0.0, "value_high": 0.4})
    (axis,) = figures.four_ways(four, "title").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["matched stable\nin unstable", "unstable\nin unstable"]
    points = [tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in axis.lines if line.get_marker() in "o^"]
    assert points == [(0.1, 0), (0.3, 1)]
    means = pd.DataFrame({"band": "unstable", "size": [1, 4], "cosine": [0.5, 0.6], "predicted": [0.5, 0.8]})
    (axis,) = figures.group_means(means.assign(cosine_low=0.4, cosine_high=0.7), "title").axes
    drawn_lines = [list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 2]
    assert [0.5, 0.6] in drawn_lines
    assert [0.5, 0.8] in drawn_lines


def test_a_page_tells_the_verdicts_of_every_cell_or_that_nobody_asked(quick):
    told = page.every_cell(quick, "C7")
    assert all(name in told for name in quick.named(quick.table("cells", every_cell=True))["name"])
    assert told.count("inconclusive") >= len(quick.study.cells)
    assert "was not asked about C9" in page.every_cell(quick, "C9")
