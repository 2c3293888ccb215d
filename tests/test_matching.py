import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers import drawn
from sae_stability.errors import UserError
from sae_stability.matching import BANDS, Stability, nearest_within, pairs, stability
from sae_stability.statistics import jackknife


def brute_force(W: torch.Tensor, alive: torch.Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    seeds, d_sae, _ = W.shape
    W = W.double().numpy()
    best = np.full((seeds, seeds, d_sae), np.nan)
    probability = np.full((seeds, d_sae), np.nan)
    for s in range(seeds):
        for i in range(d_sae):
            for t in range(seeds):
                if t == s:
                    continue
                cosines = [
                    W[s, i] @ W[t, j] / np.linalg.norm(W[s, i]) / np.linalg.norm(W[t, j]) for j in range(d_sae) if alive[t, j]
                ]
                best[s, t, i] = max(cosines, default=-1.0)
            if alive[s, i]:
                probability[s, i] = np.mean([best[s, t, i] >= threshold for t in range(seeds) if t != s])
    return best, probability


@pytest.mark.parametrize("chunk", [3, 4096])
def test_agrees_with_a_loop_on_every_entry(monkeypatch, chunk):
    monkeypatch.setattr(pairs, "CHUNK", chunk)
    W = drawn(4, 17, 3)
    alive = torch.rand(4, 17, generator=torch.Generator().manual_seed(1)) > 0.3
    found = stability(W, 0.8, alive)
    best, probability = brute_force(W, alive, 0.8)
    for s in range(4):
        for t in range(4):
            if s != t:
                live = alive[s].numpy()
                np.testing.assert_allclose(found.best_cosine[s, t][live], best[s, t][live], atol=1e-6)
    np.testing.assert_allclose(found.probability, probability)
    assert found.best_cosine.diagonal(dim1=0, dim2=1).isnan().all()


def test_a_permuted_copy_is_perfectly_stable_even_at_a_threshold_of_one():
    W = drawn(1, 50, 8)[0]
    found = stability(torch.stack([W, W[torch.randperm(50)], W[torch.randperm(50)]]), threshold=1.0)
    assert (found.probability == 1).all()
    assert found.mean().value == 1


def test_random_directions_match_as_often_as_the_sphere_says():
    d_in, d_sae, threshold = 12, 400, 0.75
    rates = stability(drawn(8, d_sae, d_in), threshold).match_rates()
    one_pair = 0.5 * stats.beta.sf(threshold**2, 0.5, (d_in - 1) / 2)  # P(cos >= threshold) of two random directions
    expected = 1 - (1 - one_pair) ** d_sae
    assert np.nanmean(rates) == pytest.approx(expected, abs=0.01)


def test_dead_features_match_nothing_and_have_no_stability():
    W = drawn(1, 10, 4)[0].repeat(3, 1, 1)
    alive = torch.ones(3, 10, dtype=torch.bool)
    alive[0, 2] = False
    found = stability(W, 0.999, alive)
    assert found.probability[0, 2].isnan()
    assert found.band[0, 2] == -1
    assert (found.probability[1:, 2] == 0.5).all()  # of the two others, one has it alive


def test_a_dictionary_without_live_features_is_matched_by_none():
    alive = torch.ones(2, 5, dtype=torch.bool)
    alive[1] = False
    found = stability(drawn(2, 5, 3), 0.1, alive)
    assert (found.probability[0] == 0).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_order_and_length_of_features_do_not_matter(seed, scale):
    W = drawn(3, 9, 4, seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    plain, moved = stability(W), stability(W[:, order] * scale)
    torch.testing.assert_close(plain.probability[:, order], moved.probability)
    torch.testing.assert_close(plain.best_cosine[..., order], moved.best_cosine, equal_nan=True, atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), low=st.floats(0.05, 0.9), step=st.floats(0.01, 0.1))
def test_a_higher_threshold_never_matches_more(seed, low, step):
    found = stability(drawn(3, 12, 3, seed=seed), low)
    assert (found.at(low + step).counts <= found.counts).all()


def test_a_permutation_of_the_seeds_permutes_the_result():
    W = drawn(4, 11, 3)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(stability(W[order]).probability, stability(W).probability[order])
    torch.testing.assert_close(stability(W).among(order).best_cosine, stability(W[order]).best_cosine, equal_nan=True)


def test_bands_and_latent_shares_of_a_known_mixture():
    shared, own = drawn(1, 30, 200)[0], drawn(6, 30, 200, seed=1)
    W = torch.cat([shared.repeat(6, 1, 1), own], dim=1)  # half come back everywhere, half nowhere
    found = stability(W)
    shares = found.shares()
    assert shares["stable"].value == shares["unstable"].value == 0.5
    assert found.separation().value == 1
    assert found.latent().above(0.9) == pytest.approx(0.5, abs=0.05)
    assert found.latent().below(0.1) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 6, 10, 11, 12, 21, 23])
def test_shares_are_those_of_features_that_miss_or_match_a_tenth_of_the_seeds_at_most(seeds):
    """Compared with the bands of single features, and with a loop over the seeds that the jackknife leaves out."""
    generator = np.random.default_rng(seeds)
    rate = generator.choice([0.02, 0.1, 0.5, 0.9, 0.98], size=(1, 1, 400))  # many near the edges of the bands
    matched, alive = generator.random((seeds, seeds, 400)) < rate, generator.random((seeds, 400)) < 0.8
    best = torch.from_numpy(np.where(matched, 1.0, 0.0)).float()
    best[torch.eye(seeds, dtype=torch.bool)] = torch.nan
    found = Stability(best, torch.zeros(best.shape, dtype=torch.int64), best, torch.from_numpy(alive), 0.7)
    tolerated = (seeds - 1) // 10  # as many with a seed left out

    def by_hand(kept: list[int]) -> dict[str, float]:
        counts = np.stack([sum(matched[s, t] for t in kept if t != s) for s in kept])[alive[kept]]
        stable, unstable = len(kept) - 1 - counts <= tolerated, counts <= tolerated
        return {"stable": stable.mean(), "unstable": unstable.mean(), "intermediate": (~stable & ~unstable).mean()}

    shares = found.shares()
    for number, band in enumerate(BANDS):
        assert shares[band].value == pytest.approx((found.band == number).sum() / alive.sum(), abs=1e-12)
        expected = jackknife(lambda kept, band=band: by_hand(kept)[band], seeds).within(0, 1)
        assert (shares[band].low, shares[band].high) == pytest.approx((expected.low, expected.high), nan_ok=True, abs=1e-12)
    assert sum(share.value for share in shares.values()) == pytest.approx(1)


def test_bands_of_a_pair_come_from_the_other_seeds():
    # Features alike in seeds 0 and 1 only: with double dipping the pair (0, 1) itself would make them intermediate.
    W = drawn(4, 20, 100)
    W[1] = W[0]
    found = stability(W)
    assert (found.counts[0] == 1).all()
    unstable, intermediate = BANDS.index("unstable"), BANDS.index("intermediate")
    assert (found.held_out_band[0, 1] == unstable).all()
    assert (found.held_out_band[0, 2] == intermediate).all()


@pytest.mark.parametrize("seeds", [5, 11])  # of ten others one may be missed, and as many where one has no say
def test_bands_of_a_pair_are_those_of_a_study_without_the_other_seed(seeds):
    alive = torch.rand(seeds, 12, generator=torch.Generator().manual_seed(0)) < 0.8
    found = stability(drawn(12, 3) + 0.3 * drawn(seeds, 12, 3, seed=1), 0.9, alive)
    assert len(np.unique(found.held_out_band)) == 4
    for left_out in (None, 2):
        kept = [seed for seed in range(seeds) if seed != left_out]
        among = found.held_out_band_among(kept)
        for s, t in itertools.product(kept, kept):
            others = [seed for seed in kept if seed != t]
            expected = found.band_among(others)[others.index(s)] if s != t else np.full(12, -1)
            np.testing.assert_array_equal(among[kept.index(s), kept.index(t)], expected)
    assert (found.among([0, 1]).held_out_band == -1).all()


def test_separation_derives_bands_again_without_each_seed():
    found = stability(drawn(40, 4) + 0.4 * drawn(6, 40, 4, seed=1), 0.9)

    def by_hand(kept: list[int]) -> float:
        back = {"stable": [], "unstable": []}
        for s, t in itertools.permutations(kept, 2):
            others = [seed for seed in kept if seed != t]
            bands = found.band_among(others)[others.index(s)]
            for name, hits in back.items():
                hits += found.matched[s, t].numpy()[bands == BANDS.index(name)].tolist()
        return np.mean(back["stable"]) - np.mean(back["unstable"])

    expected, separation = jackknife(by_hand, 6), found.separation()
    assert (separation.value, separation.low, separation.high) == pytest.approx((expected.value, expected.low, expected.high))
    three = found.among([0, 1, 2]).separation()
    assert np.isfinite(three.value)
    assert np.isnan([three.low, three.high]).all()


def test_weights_under_training_and_numpy_arrays_are_taken_as_they_are():
    W = drawn(3, 10, 4)
    for given_ in (W.clone().requires_grad_(), W.numpy(), W.double()):
        found = stability(given_)
        assert not found.best_cosine.requires_grad
        torch.testing.assert_close(found.best_cosine, stability(W).best_cosine, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(1, 4, 2),), "W_dec"),
        ((torch.ones(4, 2),), "W_dec"),
        ((torch.full((2, 4, 2), torch.nan),), "NaN"),
        ((torch.stack([torch.ones(4, 2), torch.zeros(4, 2)]),), "zero"),
        ((torch.ones(2, 4, 2), 0.0), "threshold"),
        ((torch.ones(2, 4, 2), 1.1), "threshold"),
        ((torch.ones(2, 4, 2), 0.7, torch.ones(2, 3)), "alive"),
    ],
)
def test_what_can_not_be_compared_is_said(arguments, named, unchecked):
    with pytest.raises(UserError, match=named):
        stability(*arguments)


def test_partners_runners_up_and_ambiguity_agree_with_a_loop():
    W, threshold = drawn(3, 25, 3), 0.9
    alive = torch.rand(3, 25, generator=torch.Generator().manual_seed(2)) > 0.2
    found = stability(W, threshold, alive)
    unit = torch.nn.functional.normalize(W, dim=2)
    best_of = {}
    for s in range(3):
        for t in range(3):
            for i in range(25):
                if s != t and alive[s, i]:
                    cosines = {j: float(unit[s, i] @ unit[t, j]) for j in range(25) if alive[t, j]}
                    first, second = sorted(cosines, key=cosines.get, reverse=True)[:2]
                    best_of[s, t, i] = first
                    assert found.partner[s, t, i] == first
                    assert found.runner_up[s, t, i] == pytest.approx(cosines[second], abs=1e-6)
    for (s, t, i), partner in best_of.items():
        mutual = best_of[t, s, partner] == i
        matched = found.best_cosine[s, t, i] >= threshold
        assert found.mutual[s, t, i] == mutual
        assert found.ambiguous[s, t, i] == (matched and (found.runner_up[s, t, i] >= threshold or not mutual))
        assert found.both_ways().matched[s, t, i] == (matched and mutual)
    assert 0 < found.ambiguous.sum() < found.matched.sum()


def test_the_compiled_pass_finds_what_the_reference_finds():
    generator = torch.Generator().manual_seed(0)
    block, rows = torch.randn(40, 1300, generator=generator), torch.arange(0, 80, 2)
    ours, reference = ([pairs.Best.none(80, block.device), pairs.Best.none(1300, block.device)] for _ in range(2))
    for part, of in ((block, rows), (torch.randn(40, 1300, generator=generator), rows + 1)):  # columns go on from chunk to chunk
        pairs.two_largest(part, of, *reference)
        pairs.threads.call(pairs._two_largest, part.numpy(), of.numpy(), *(t.numpy() for best in ours for t in best), 3)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_nearest_within_a_dictionary_is_never_itself():
    W = torch.nn.functional.normalize(drawn(1, 30, 5)[0], dim=1)
    W[7] = W[3]
    alive = torch.ones(30, dtype=torch.bool)
    alive[11] = False
    found = nearest_within(W, alive)
    cosines = (W @ W.T).fill_diagonal_(-1)[:, alive].amax(1)
    torch.testing.assert_close(found[alive], cosines[alive])
    assert found[3] == pytest.approx(1, abs=1e-6)
    assert found[11].isnan()


def test_the_area_under_the_curve_is_its_integral():
    found = stability(drawn(3, 40, 4))
    steps = np.linspace(0, 1, 2001)[1:]
    assert found.area().value == pytest.approx(np.mean([found.at(float(step)).mean().value for step in steps]), abs=1e-3)
