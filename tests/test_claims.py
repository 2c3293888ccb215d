import math

import pytest
import torch

from sae_stability.claims import CLAIMS, Condition, judge_c1, not_tested, verdict
from sae_stability.matching import stability
from sae_stability.statistics import Interval


def ensemble(shared: int, own: int, seeds: int = 6, seed: int = 0):
    """Seeds that have `shared` directions in common and `own` ones each has alone; the shared ones vary a little in number."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shared, 300, generator=generator)
    dictionaries = []
    for position in range(seeds):
        lost = position % 3
        mine = torch.randn(own + lost, 300, generator=generator)
        dictionaries.append(torch.cat([common[: shared - lost], mine]))
    return stability(torch.stack(dictionaries))


@pytest.mark.parametrize(
    ("low", "high", "met"), [(0.6, 0.8, True), (0.1, 0.4, False), (0.4, 0.6, None), (0.5, 0.7, None), (math.nan, math.nan, None)]
)
def test_a_condition_is_met_when_its_whole_interval_is_above_the_bound(low, high, met):
    assert Condition("x", Interval(0.5, low, high), 0.5).met is met


def test_a_claim_needs_all_its_conditions():
    yes, no, open_ = (Condition("x", Interval(0, *ends), 0) for ends in ((1, 2), (-2, -1), (-1, 1)))
    assert verdict([yes, yes]) == "supported"
    assert verdict([yes, open_]) == "inconclusive"
    assert verdict([open_, no]) == "not supported"


def test_c1_holds_where_features_are_planted_and_fails_where_the_null_does_as_well():
    planted, noise = ensemble(40, 40), ensemble(4, 76, seed=1)
    assert judge_c1(planted, {"surrogate": noise}, "cell")["verdict"] == "supported"
    assert judge_c1(planted, {"surrogate": planted}, "cell")["verdict"] != "supported"
    assert judge_c1(noise, {"surrogate": planted}, "cell")["verdict"] == "not supported"


def test_shuffled_weights_stand_beside_the_verdict_and_not_in_the_rule():
    planted, noise = ensemble(40, 40), ensemble(4, 76, seed=1)
    alone, beside = (judge_c1(planted, {"surrogate": noise, **more}, "cell") for more in ({}, {"randomised": planted}))
    assert beside["verdict"] == alone["verdict"] == "supported"
    surrogate, randomised = beside["nulls"]
    assert surrogate["above_low"] > 0
    assert (randomised["null"], randomised["above"]) == ("randomised", 0)


def test_the_ledger_has_every_field_and_no_nan():
    tested = judge_c1(ensemble(5, 5, seeds=2), {"surrogate": ensemble(5, 5, seeds=2)}, "cell")
    for claim in (tested, not_tested("C7", "cell")):
        assert {"id", "claim", "verdict", "statistic", "value", "ci_low", "ci_high", "null", "rule", "cell"} <= set(claim)
        assert not any(isinstance(value, float) and math.isnan(value) for value in claim.values())
    assert tested["verdict"] != "supported"  # two seeds give no interval


def test_all_claims_of_the_paper_and_all_our_questions_are_listed():
    assert list(CLAIMS) == [*(f"C{number}" for number in range(1, 11)), *(f"B{number}" for number in range(1, 6))]
