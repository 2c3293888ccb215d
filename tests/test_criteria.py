import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from helpers import drawn
from sae_stability.matching import CRITERIA, Stability, by_every_criterion, calibrate, criteria, mean_at, stability
from sae_stability.statistics import reach_without

ALIVE = torch.ones(3, 20, dtype=torch.bool)


def codes(seed: int, tokens: int = 400, features: int = 20) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.random((tokens, features)) * (generator.random((tokens, features)) < 0.2)).astype(np.float32)


def test_correlations_of_activations_agree_with_numpy():
    Z = [codes(seed) for seed in range(3)]
    Z[1][:, 4] = 0  # never fires
    found = criteria.by_activation([sparse.csr_array(z) for z in Z], 0.3, ALIVE)
    for s, t in ((0, 1), (1, 2), (2, 0)):
        with np.errstate(invalid="ignore"):
            theirs = np.nan_to_num(np.corrcoef(Z[s].T, Z[t].T)[:20, 20:])
        expected = np.where((s == 1) & (np.arange(20) == 4), np.nan, theirs.max(1))
        np.testing.assert_allclose(found.best_cosine[s, t], expected, atol=1e-5)


def test_features_that_hardly_fire_take_no_part_where_activations_tell():
    """Two that fire once, on the same token, correlate by 1."""
    Z = np.zeros((400, 3), dtype=np.float32)
    for feature, fires in enumerate((1, 49, 50)):
        Z[:fires, feature] = 1
    found = criteria.by_activation([sparse.csr_array(Z)] * 2, 0.9, torch.ones(2, 3, dtype=torch.bool))
    assert found.matched[0, 1].tolist() == [False, False, True]
    assert found.alive.tolist() == [[False, False, True]] * 2
    assert found.mean().value == 1


def test_one_to_one_gives_a_partner_to_one_feature_only():
    W = drawn(2, 20, 3)
    W[1, 5] = W[1, 6] = W[0, 0]  # both are like feature 0 of the other seed, which can be paired with one
    plain, paired = stability(W, 0.999), criteria.one_to_one(W, 0.999, ALIVE[:2])
    assert plain.matched[1, 0, 5:7].all()
    assert paired.matched[1, 0, 5] ^ paired.matched[1, 0, 6]
    assert paired.mutual[0, 1].all()


def test_decoder_and_encoder_must_agree_on_one_partner():
    D, E = F.normalize(drawn(2, 20, 40), dim=2), F.normalize(drawn(2, 20, 40, seed=1), dim=2)
    D[1, 3], E[1, 3] = D[0, 0], E[0, 0]  # both in one feature
    D[1, 4], E[1, 5] = D[0, 1], E[0, 1]  # in two different ones
    found = criteria.with_encoder(D, E.mT, 0.9, ALIVE[:2])
    assert found.matched[0, 1, :2].tolist() == [True, False]


def test_whitened_cosines_do_not_see_a_linear_map_of_the_data():
    W, mixing = drawn(3, 20, 6), drawn(6, 6, seed=2) + 3 * torch.eye(6)
    covariance = torch.eye(6)
    moved = W @ mixing.T  # directions of data under the map, whose covariance becomes mixing mixing^T
    one = stability(W @ criteria.whitening(covariance, criteria.SMALLEST_VARIANCE))
    other = stability(moved @ criteria.whitening(mixing @ mixing.T, criteria.SMALLEST_VARIANCE))
    torch.testing.assert_close(one.best_cosine, other.best_cosine, equal_nan=True, atol=1e-4, rtol=0)


def test_what_only_the_first_component_shares_is_gone_without_it():
    first = F.normalize(drawn(6, seed=3), dim=0)
    covariance = torch.eye(6) + 50 * torch.outer(first, first)
    W = 5 * first + drawn(3, 20, 6)
    assert stability(W).mean().value > 0.99
    rest = W @ criteria.without_top_component(covariance)
    torch.testing.assert_close(rest @ first, torch.zeros(3, 20), atol=1e-4, rtol=0)
    assert stability(rest).mean().value < 0.9


@pytest.mark.parametrize("threshold", [0.99, 1.0])
def test_every_criterion_takes_a_permuted_copy_for_the_same(threshold):
    W, E, Z = drawn(1, 20, 6)[0], drawn(6, 20, seed=1), codes(0)
    orders = [torch.randperm(20, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = by_every_criterion(
        torch.stack([W[order] for order in orders]),
        torch.stack([E[:, order] for order in orders]),
        [sparse.csr_array(Z[:, order.numpy()]) for order in orders],
        torch.eye(6) + 0.1 * torch.ones(6, 6),
        threshold,
        ALIVE,
    )
    assert list(found) == list(CRITERIA)
    for name, by in found.items():
        assert by.mean().value == pytest.approx(1), name


def with_cosines(values: np.ndarray) -> Stability:
    """Two seeds whose features have these best cosines in the other one."""
    best_cosine = torch.full((2, 2, len(values)), torch.nan)
    best_cosine[0, 1] = best_cosine[1, 0] = torch.from_numpy(values).float()
    partner = torch.zeros(best_cosine.shape, dtype=torch.int64)
    return Stability(best_cosine, partner, best_cosine, torch.ones(2, len(values), dtype=torch.bool), 0.7)


def uniform(low: float, high: float, count: int) -> np.ndarray:
    """As evenly spread as can be."""
    return low + (high - low) * (np.arange(count) + 0.5) / count


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.8))
@example(seed=4662, share=1 / 3)  # the rates are as 1 to 3 to the last digit, and equal ones are allowed
def test_the_calibrated_threshold_is_the_smallest_at_which_the_surrogate_matches_rarely_enough(seed, share):
    common, own = drawn(15, 8, seed=seed), drawn(3, 15, 8, seed=seed + 1)
    alive = torch.rand(3, 15, generator=torch.Generator().manual_seed(seed)) > 0.4  # seeds have unequal numbers of live features
    real, surrogate = stability(common + 0.4 * own, alive=alive), stability(drawn(3, 15, 8, seed=seed + 2))

    def allowed(threshold: float) -> bool:
        rates, null = (np.nanmean(each.at(threshold).match_rates()) for each in (real, surrogate))
        return null - share * rates <= 1e-9

    found = calibrate(real, surrogate, share).threshold
    observed = np.unique(torch.cat([each.best_cosine[~each.best_cosine.isnan()] for each in (real, surrogate)]))
    observed = observed[observed > 0].tolist()
    by_brute_force = next((cosine for cosine in observed if allowed(cosine)), np.nan)
    assert found == pytest.approx(by_brute_force, abs=0, nan_ok=True)
    ends = [cosine for cosine in observed if not cosine >= found]  # between two observed ones all thresholds are alike
    assert not any(allowed(threshold) for threshold in np.arange(0.02, ends[-1], 0.02))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_calibrated_threshold_of_uniform_cosines_is_where_two_lines_meet(share):
    real, surrogate = with_cosines(uniform(0, 1, 20_000)), with_cosines(uniform(0, 0.5, 20_000))
    meet = (1 - share) / (2 - share)  # 1 - 2 tau = share (1 - tau)
    assert calibrate(real, surrogate, share).threshold == pytest.approx(meet, abs=1e-4)


def test_a_second_hump_of_the_surrogate_does_not_move_the_calibrated_threshold_above_it():
    """The quantile that 1 % reach lies above 0.9. From a threshold of 0.4 on, the hump is too much for the bound again."""
    real, surrogate = uniform(0, 1, 10_000), np.concatenate([uniform(0, 0.3, 9_700), uniform(0.9, 1, 300)])
    meet = (1 - 0.05) / (0.97 / 0.3 - 0.05)  # 0.97 (1 - tau / 0.3) + 0.03 = 0.05 (1 - tau)
    found = calibrate(with_cosines(real), with_cosines(surrogate), 0.05).threshold
    assert found == pytest.approx(meet, abs=1e-3)
    assert found < 0.3


def test_there_is_no_calibrated_threshold_for_what_is_like_its_surrogate():
    noise = stability(drawn(3, 20, 6))
    found = calibrate(noise, noise, 0.05)
    assert np.isnan(found.threshold)
    assert np.isnan(found.interval(lambda at, *_: at).value)


def test_the_threshold_is_calibrated_again_without_each_seed():
    """Compared with what the other seeds alone would have given."""
    common, own = drawn(15, 8), drawn(5, 15, 8, seed=1)
    alive = torch.rand(5, 15, generator=torch.Generator().manual_seed(2)) > 0.2
    real, surrogate = stability(common + 0.4 * own, alive=alive), stability(drawn(4, 15, 8, seed=2))
    found, everyone = calibrate(real, surrogate, 0.3), [list(range(5)), list(range(4))]
    interval = found.interval(lambda at, ours, theirs: mean_at(real, at, ours) - mean_at(surrogate, at, theirs))

    def less(ours: list[int], theirs: list[int]) -> float:
        kept, null = real.among(ours), surrogate.among(theirs)
        at = calibrate(kept, null, 0.3).threshold
        return kept.at(at).mean().value - null.at(at).mean().value

    assert interval.value == pytest.approx(less(*everyone))
    without = [[less([seed for seed in everyone[0] if seed != out], everyone[1]) for out in everyone[0]]]
    without.append([less(everyone[0], [seed for seed in everyone[1] if seed != out]) for out in everyone[1]])
    assert interval.high - interval.value == pytest.approx(np.hypot(*map(reach_without, without)))


def test_an_interval_at_the_calibrated_threshold_holds_what_it_should():
    """Ensembles of one kind: the interval that takes the threshold as known is too narrow for them."""
    common, found, fixed = 1.5 * drawn(24, 12), [], []
    for draw in range(120):
        real, surrogate = stability(common + drawn(6, 24, 12, seed=draw)), stability(drawn(4, 24, 12, seed=1000 + draw))
        calibration = calibrate(real, surrogate, 0.3)
        found.append(calibration.interval(lambda at, ours, _, real=real: mean_at(real, at, ours)))
        fixed.append(real.at(calibration.threshold).mean())
    truth = np.mean([interval.value for interval in found])
    held, of_fixed = (np.mean([each.low <= truth <= each.high for each in intervals]) for intervals in (found, fixed))
    assert 0.92 <= held <= 1
    assert of_fixed < 0.88


def test_two_seeds_have_a_calibrated_threshold_and_no_interval():
    found = calibrate(with_cosines(uniform(0, 1, 500)), with_cosines(uniform(0, 0.5, 500)), 0.05)
    assert np.isfinite(found.threshold)
    interval = found.interval(lambda at, ours, theirs: at + len(ours) + len(theirs))
    assert interval.value == found.threshold + 4
    assert np.isnan([interval.low, interval.high]).all()
