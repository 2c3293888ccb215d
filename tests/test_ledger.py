"""Verdicts, and the rule of C1 on ensembles whose reappearances are planted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_stability.experiments.stability import judge_c1
from sae_stability.ledger import CLAIMS, NOWHERE, VERDICTS, Condition, Rule, judged, not_tested, verdict
from sae_stability.matching import Stability, at_equal_frequency
from sae_stability.statistics import Interval


def around(value: float, reach: float = 0.05) -> Interval:
    return Interval(value, value - reach, value + reach)


@pytest.mark.parametrize(
    ("value", "below", "no_effect", "wanted"),
    [
        (0.6, False, 0.0, "supported"),
        (0.52, False, 0.0, "inconclusive"),
        (0.4, False, 0.0, "weaker than the bound"),
        (-0.2, False, 0.0, "opposite"),
        (0.4, False, None, "opposite"),  # the bound is no effect
        (0.4, True, 1.0, "supported"),
        (0.7, True, 1.0, "weaker than the bound"),
        (1.2, True, 1.0, "opposite"),
        (float("nan"), False, None, "inconclusive"),
    ],
)
def test_a_missed_bound_is_not_an_opposite_effect(value, below, no_effect, wanted):
    assert verdict([Condition("share", around(value), 0.5, below, no_effect)]) == wanted


@given(st.lists(st.sampled_from([0.7, 0.52, 0.4, -0.3]), min_size=1, max_size=4))
def test_all_conditions_are_asked_for_and_the_worst_is_told(values):
    found = verdict([Condition("share", around(value), 0.5, no_effect=0.0) for value in values])
    order = {-0.3: "opposite", 0.4: "weaker than the bound", 0.52: "inconclusive", 0.7: "supported"}
    assert found == order[min(values)]
    assert found in VERDICTS


def test_another_definition_that_gives_another_verdict_is_told():
    rule, met, missed = Rule("C5", "share", "it lies above"), Condition("x", around(0.7), 0.5), Condition("x", around(0.3), 0.5)
    assert judged(rule, around(0.7), NOWHERE, [met], [missed])["verdict"] == "depends on the definition"
    line = judged(rule, around(0.7), NOWHERE, [met], [met])
    assert (line["verdict"], line["null"], line["line"], line["claim"]) == ("supported", None, "as stated", CLAIMS["C5"])
    assert not_tested("C9")["verdict"] in VERDICTS


def reappearing(rng: np.random.Generator, probability: np.ndarray, seeds: int) -> Stability:
    """Features that each seed has with a probability of its own, and otherwise another in its place; cosines of 0.9 or 0.3."""
    has = rng.random((seeds, len(probability))) < probability
    cosine = np.where(has[:, None] & has[None], 0.9, 0.3)
    cosine[np.eye(seeds, dtype=bool)] = np.nan
    best = torch.from_numpy(cosine).float()
    return Stability(best, torch.zeros(best.shape, dtype=torch.int64), best, torch.ones(has.shape, dtype=torch.bool), 0.7)


def test_c1_is_supported_where_features_of_two_kinds_are_planted_and_opposite_where_noise_comes_back_more():
    rng = np.random.default_rng(0)
    model, noise = np.repeat([0.97, 0.03], 150), np.repeat([0.97, 0.03], [10, 290])
    matched = {"real": reappearing(rng, model, 11), "surrogate": reappearing(rng, noise, 5)}
    frequency = {kind: np.full(each.alive.shape, 0.01) for kind, each in matched.items()}
    lines = judge_c1(matched, frequency)
    assert [line["line"] for line in lines] == ["as stated", "beyond size and noise", "beyond energy and frequency"]
    assert lines[0]["verdict"] == lines[2]["verdict"] == "supported"
    assert lines[1]["conditions"][0]["met"]
    assert [null["null"] for null in lines[0]["nulls"]] == ["surrogate"]
    swapped = judge_c1(
        {"real": matched["surrogate"], "surrogate": matched["real"]},
        frequency | {"real": frequency["surrogate"], "surrogate": frequency["real"]},
    )
    assert [line["verdict"] for line in swapped[1:]] == ["opposite", "opposite"]


def test_reliability_is_the_share_of_the_variance_that_is_not_chance():
    rng = np.random.default_rng(1)

    def of(probability: np.ndarray) -> float:
        matched = rng.random((11, 11, 4000)) < probability
        best = np.where(np.eye(11, dtype=bool)[:, :, None], np.nan, np.where(matched, 0.9, 0.3))
        best = torch.from_numpy(best).float()
        return Stability(best, best.long(), best, torch.ones(11, 4000, dtype=torch.bool), 0.7).reliability().value

    # Of Beta(a, b) a share 1 / (1 + a + b) of a match's variance is the feature's, and n / (n + a + b) of that of n matches.
    assert of(rng.beta(0.8, 0.6, (11, 1, 4000))) == pytest.approx(10 / (10 + 0.8 + 0.6), abs=0.01)
    assert of(np.full(4000, 0.7)) < 0.05


def test_a_null_at_the_frequencies_of_others_has_their_mix_of_its_own_rates():
    """Two frequencies: the null's rare features never come back, its frequent ones always; of the others half are rare."""
    frequent = np.arange(100) < 10
    matched = np.broadcast_to(frequent, (3, 3, 100)).astype(np.float32)
    best = torch.from_numpy(np.where(np.eye(3, dtype=bool)[:, :, None], np.nan, matched))
    null = Stability(best, best.long(), best, torch.ones(3, 100, dtype=torch.bool), 0.7)
    ones, often = np.ones((3, 100)), np.broadcast_to(np.where(frequent, 0.1, 0.001), (3, 100))
    theirs = np.broadcast_to(np.where(np.arange(40) < 20, 0.1, 0.001), (5, 40))
    assert at_equal_frequency(null, ones, often, np.ones((5, 40)), theirs).value == pytest.approx(0.5)
    assert at_equal_frequency(null, ones, often, ones, often).value == pytest.approx(0.1) == pytest.approx(null.mean().value)
    nowhere = at_equal_frequency(null, ones, often, np.ones((5, 40)), np.full((5, 40), 0.9))
    assert np.isnan(nowhere.value)
