"""What the chapter on stability derives: closed forms, planted tables, and other ways to the same number."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from sae_stability.book import derived
from sae_stability.matching import BANDS, stability
from sae_stability.statistics import Interval
from sae_stability.study import Study


def directions(count: int, d_in: int) -> np.ndarray:
    drawn = np.random.default_rng(count).standard_normal((count, d_in))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_random_directions_are_as_close_as_the_formula_says():
    d_in, d_sae = 12, 50
    cosines = directions(4000, d_in) @ directions(d_sae, d_in).T
    chance = derived.random_cosines(0.5, d_in, d_sae)
    assert cosines.std() == pytest.approx(chance.spread, rel=0.02)
    assert (cosines >= 0.5).mean() == pytest.approx(chance.above, rel=0.05)
    assert np.median(cosines.max(1)) == pytest.approx(chance.best, abs=0.02)


def test_on_a_circle_the_probability_is_that_of_an_angle():
    assert derived.random_cosines(0.5, 2, 10).above == pytest.approx(1 / 3)  # within 60 degrees on either side
    assert derived.random_cosines(0.5, 2, 1).best == pytest.approx(0, abs=1e-9)  # half of the directions lie behind


def test_dead_features_take_no_part(monkeypatch):
    table = pd.DataFrame({"feature": [0, 1, 2], "alive": [True, False, True]})
    monkeypatch.setattr(derived.tables, "features_at", lambda results, kind, threshold: table)
    live = derived.live_features(None, 0.7)
    assert live["feature"].tolist() == [0, 2]
    assert live.index.tolist() == [0, 1]


def test_curves_of_subspaces_are_those_of_a_set_in_its_own_kind_by_rank():
    names = ["kind", "quantity", "coordinates", "of", "by", "rank", "value"]
    share, written = "share of ceiling", "written"
    planted = [
        ("real", share, written, "unstable", "unstable", 16, 0.6),
        ("real", share, written, "unstable", "unstable", 8, 0.5),
        ("real", share, written, "unstable", "axes", 8, 0.9),  # in the principal axes
        ("real", "captured", written, "unstable", "unstable", 8, 0.3),
        ("real", share, "whitened", "unstable", "unstable", 8, 0.2),
        ("surrogate", share, written, "unstable", "unstable", 8, 0.1),
        ("surrogate", share, written, "alike", "alike", 8, 0.35),
    ]
    tables = {"subspaces": pd.DataFrame(planted, columns=names)}
    curves = derived.shared_curves(SimpleNamespace(table=tables.get))
    assert {name: list(curve["value"]) for name, curve in curves.items()} == {
        "unstable features, in those of another seed": [0.5, 0.6],
        "features of noise, most alike in energy and frequency": [0.35],
    }
    assert derived.curves_in_words({"a set": curves["unstable features, in those of another seed"]}) == (
        "a set: 0.50 at rank 8, 0.60 at rank 16."
    )
    unknown = pd.DataFrame({"rank": [8, 16], "value": [float("nan")] * 2})  # too few seeds
    assert derived.curves_in_words({"a set": unknown}) == "a set: not defined."
    assert derived.shared_curves(SimpleNamespace(table=lambda name: pd.DataFrame(columns=["cell"]))) == {}


def test_stability_is_judged_at_the_threshold_that_is_asked_for(monkeypatch):
    matched = SimpleNamespace(at=lambda threshold: f"at {threshold}")
    monkeypatch.setattr(derived.matching, "stability", lambda results, kind: matched)
    results = SimpleNamespace(cell=SimpleNamespace(kinds=["real", "surrogate", "whitened"]))
    assert derived.stability_by_kind(results, 0.8) == dict.fromkeys(["real", "surrogate", "whitened"], "at 0.8")


def test_curves_of_unstable_features_count_pairs_by_bands_of_the_other_seeds(monkeypatch):
    W_dec = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(0))
    found = stability(W_dec, 0.7)
    monkeypatch.setattr(derived.matching, "stability", lambda results, kind: found)
    curve = derived.reappearance_curves(None, ["real"], [0.4, 0.7]).set_index("cosine")["p"]
    best, shares = found.best_cosine, {0.4: [], 0.7: []}
    for s, t in permutations(range(4), 2):
        others = [seed for seed in range(4) if seed != t]  # the bands of the chapter's other numbers: as many misses as among all
        members = np.flatnonzero(found.band_among(others)[others.index(s)] == BANDS.index("unstable"))
        for cosine, of_pairs in shares.items():
            of_pairs.append(np.mean([float(best[s, t, i]) >= cosine for i in members]))
    assert curve.to_dict() == pytest.approx({cosine: np.mean(of_pairs) for cosine, of_pairs in shares.items()})
    monkeypatch.setattr(derived.matching, "stability", lambda results, kind: stability(W_dec[:2], 0.7))
    assert derived.reappearance_curves(None, ["real"], [0.4]).empty  # two seeds have no others


def test_a_row_of_each_feature_is_made_of_counts():
    names = ["topk, d_sae=256", "topk, d_sae=512 †", "topk, d_sae=512 †"]
    counts = pd.DataFrame(
        {"name": names, "kind": ["real", "surrogate", "whitened"], "trials": 9, "matches": [6, 0, 3], "features": [3, 2, 4]}
    )
    table = derived.grid_at_equal_seeds(SimpleNamespace(others={"counts": counts}.get))
    assert table.value_counts().to_dict() == {(names[0], "real", 6, 9): 3, (names[1], "surrogate", 0, 9): 2}


def test_back_everywhere_counts_features_with_a_match_in_every_other_seed():
    features = pd.DataFrame({"kind": ["real"] * 4 + ["surrogate"] * 2, "matches": [3, 3, 3, 2, 0, 2], "trials": 3})
    assert derived.share_back_everywhere(features).to_dict() == {"real": 0.75, "surrogate": 0.0}


@pytest.mark.parametrize(
    ("mean", "null", "words"),
    [
        ((0.6, 0.5, 0.7), (0.1, 0.0, 0.2), "more comes back in the model"),
        ((0.1, 0.0, 0.2), (0.6, 0.5, 0.7), "more comes back in this null"),
        ((0.3, 0.1, 0.5), (0.2, 0.0, 0.4), "does not tell the two apart"),
        ((0.6, np.nan, np.nan), (0.1, 0.0, 0.2), "seeds are few"),
    ],
)
def test_a_difference_is_put_into_words_by_its_interval(mean, null, words):
    assert words in derived.compared(Interval(*mean), Interval(*null))


def test_seeds_are_enough_from_the_first_number_that_knows_the_share():
    table = pd.DataFrame({"seeds": [3, 4, 5], "latent_stable_share_low": [0.1, 0.2, 0.25]})
    table["latent_stable_share_high"] = [0.5, 0.38, 0.35]
    assert derived.seeds_needed(table, 0.05) == 5
    assert derived.seeds_needed(table, 0.1) == 4
    assert derived.seeds_needed(table, 0.01) is None


def test_shares_in_families_add_up_over_their_sizes():
    families = pd.DataFrame({"size": [1, 1, 2, 4]})
    assert [derived.share_in_families(families, size) for size in (1, 2, 3, 4)] == [0.25, 0.25, 0, 0.5]


def test_live_features_are_counted_a_seed_and_a_kind():
    unique = pd.DataFrame({"kind": ["real", "real", "surrogate"], "seeds": [1, 2, 1], "families": [3, 5, 2]})
    features = pd.DataFrame({"kind": ["real"] * 6 + ["surrogate"] * 2, "seed": [3, 3, 3, 7, 7, 7, 3, 3]})
    features["alive"] = [True, True, True, True, False, False, True, True]
    assert derived.with_live_features(unique, features)["features"].tolist() == [2, 2, 2]


def test_rank_correlations_are_spearmans_with_ties_a_seed():
    generator = np.random.default_rng(0)
    features = pd.DataFrame({"seed": np.repeat([2, 9], 40), "frequency": generator.random(80)})
    features["stability"] = generator.integers(0, 4, 80) / 3
    correlations = derived.frequency_correlations(features)
    assert correlations.index.tolist() == [2, 9]
    for seed, part in features.groupby("seed"):
        assert correlations[seed] == pytest.approx(spearmanr(part["frequency"], part["stability"]).statistic)


def test_a_seed_whose_features_are_all_alike_has_no_rank_correlation():
    features = pd.DataFrame({"seed": 0, "frequency": [0.1, 0.2, 0.3], "stability": 0.5})
    assert derived.frequency_correlations(features).isna().all()


def test_keys_that_differ_are_those_of_some_cell_from_the_main_one():
    keys = {"model": "none", "hook_name": "blocks.0.hook_resid_post", "tokens": 2048, "d_sae": 24, "k": 3, "seeds": 3}
    study = Study(name="s", **keys, grid={"variant": ["topk", "relu"], "d_sae": [24, 48], "seeds": [3]})
    assert derived.keys_that_differ(study) == ["variant", "d_sae"]
    assert derived.keys_that_differ(Study(name="s", **keys)) == []


def test_what_comes_back_is_told_of_the_same_saes_once():
    def study(name: str, nulls: list[str], grid: dict, share: float) -> SimpleNamespace:
        keys = {"model": "m", "hook_name": "blocks.0.hook_resid_post", "tokens": 1000, "batch": 100, "k": 4, "d_sae": 64}
        chosen = Study(name=name, seeds=3, nulls=nulls, grid=grid, **keys)
        found = {"kind": "real", "weight": "energy", "share": share, "share_low": share - 0.1, "share_high": 1}
        rows = [{"cell": id, "name": cell.variant, **found} for id, cell in chosen.cells.items()]
        return SimpleNamespace(table=lambda *_, **__: pd.DataFrame(rows), named=lambda rows: rows, study=chosen)

    one, two = study("one", ["surrogate", "whitened"], {}, 0.5), study("two", ["surrogate"], {"variant": ["relu"]}, 0.7)
    assert not set(one.study.cells) & set(two.study.cells)
    table = derived.what_comes_back([one, two])
    assert table[["study", "name", "seeds"]].values.tolist() == [["one", "topk", 3], ["two", "relu", 3]]
    assert table["real/energy"].tolist() == [0.5, 0.7]
    assert table["real/energy_low"].tolist() == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ((0.20, 0.19, 0.21), (0.21, 0.20, 0.22), "has settled within 0.05"),
        ((0.20, 0.10, 0.30), (0.21, 0.11, 0.31), "is not known to have settled"),
        ((0.30, 0.29, 0.31), (0.20, 0.19, 0.21), "still falls"),
        ((0.20, 0.19, 0.21), (0.30, 0.29, 0.31), "still rises"),
        ((0.20, np.nan, np.nan), (0.20, 0.19, 0.21), "cannot be told: seeds are few"),
    ],
)
def test_a_share_has_settled_only_where_its_whole_change_is_small(was, now, words):
    before, last = (pd.Series(of, index=["share", "share_low", "share_high"]) for of in (was, now))
    assert derived.settled(before, last, "share", 0.05) == words


def test_so_many_seeds_are_enough_only_if_more_are_too():
    ends = {"latent_stable_share_low": [0.4, 0.45, 0.4, 0.46, 0.47], "latent_stable_share_high": [0.6, 0.54, 0.6, 0.54, 0.53]}
    by_seeds = pd.DataFrame({"seeds": [3, 5, 11, 21, 96], **ends})
    assert derived.seeds_needed(by_seeds, 0.05) == 21
    assert derived.seeds_needed(by_seeds, 0.01) is None


def test_verdicts_are_counted_by_claim():
    def line(claim: str, verdict: str, line: str = "as stated") -> dict:
        return {"id": claim, "verdict": verdict, "line": line}

    ledger = [line("C1", "supported"), line("C1", "opposite"), line("C2", "inconclusive"), line("C1", "opposite")]
    ledger += [line("C1", "supported", "beyond size and noise"), line("C6", "not tested")]
    assert derived.verdicts_by_claim(ledger) == "C1 *opposite* in 2 of 3, *supported* in 1 of 3; C2 *inconclusive* in 1 of 1"
    assert derived.verdicts_by_claim([]) == ""


def test_where_verdicts_fall_is_told_by_names_in_their_order():
    fell = {
        ("C2", "a"): "supported",
        ("C2", "b"): "opposite",
        ("C2", "c"): "supported",
        ("C1", "a"): "inconclusive",
        ("C6", "a"): "not tested",
    }
    ledger = [{"id": claim, "line": "as stated", "verdict": verdict, "cell": cell} for (claim, cell), verdict in fell.items()]
    ledger.append({"id": "C2", "line": "beyond size and noise", "verdict": "opposite", "cell": "a"})
    told = derived.where_verdicts_fall(ledger, {"c": "wide", "b": "middle", "a": "narrow"})
    assert told == "- C1: *inconclusive* at all\n- C2: *supported* at wide, narrow; *opposite* at middle"
    assert derived.where_verdicts_fall([], {}) == ""


def test_what_was_judged_by_earlier_rules_is_named():
    def line(claim: str, rule: str | None) -> dict:
        return {"id": claim, "line": "as stated", "rule": rule}

    here = [line("C1", "one"), line("C2", "two"), line("C5", "five")]
    assert derived.by_earlier_rules(here, here) == ""
    there = [line("C1", "one"), line("C5", "as before"), line("C9", "unknown"), line("C2", None)]  # not tested there
    assert derived.by_earlier_rules(here, there).startswith("There C5 was")


def test_typical_features_lie_in_the_middle_of_their_band(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.randn(5, 60, generator=generator), torch.randn(4, 7, 60, generator=generator)
    apart = torch.linspace(0, 0.5, 5)[:, None] * torch.randn(4, 5, 60, generator=generator)
    found = stability(torch.cat([shared + apart, own], 1))
    monkeypatch.setattr(derived.matching, "stability", lambda results, kind: found)
    typical = derived.typical_features(None, 0.7)
    assert typical.groupby("band").size().to_dict() == {"stable": 3, "unstable": 3}
    for band, of in typical.groupby("band"):
        members = np.flatnonzero(found.band[0] == BANDS.index(band))
        means = found.best_cosine[0, 1:].mean(0).numpy()[members]
        assert of["cosine"].mean() == pytest.approx(np.sort(means)[len(means) // 2], abs=1e-6)
        np.testing.assert_allclose(of["cosine"], found.best_cosine[0, 1:, of["feature"].iloc[0]])
    monkeypatch.setattr(derived.matching, "stability", lambda results, kind: stability(shared.expand(3, 5, 60)))
    assert set(derived.typical_features(None, 0.7)["band"]) == {"stable"}  # no feature is unstable
