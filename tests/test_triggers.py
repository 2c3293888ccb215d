"""Triggers against dense group averages, closed forms and planted features."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from sae_stability.experiments import triggers as experiment
from sae_stability.experiments.triggers import judge_c5, training_shares
from sae_stability.language.corpus import Contexts
from sae_stability.matching import Banding, Stability
from sae_stability.triggers import (
    CHANCE,
    CLASSES,
    FEWEST,
    PARTS,
    SURFACE,
    TELLS,
    WITH_BUNDLES,
    Text,
    at_equal_frequency,
    by_chance,
    classify,
    cliffs_delta,
    compare,
    delta,
    explained,
    paired,
    surface_share,
    triggers,
    without_parts,
)

WORDS = ["<bos>", " array", " arrays", " Array", "(", ",", " the", " matrix", " sum", " mean", " reshape", " repeat", " return"]
FREQUENCY = np.full(len(WORDS), 0.1)


def text(tokens: int = 40_000, seed: int = 0) -> Text:
    """Random tokens in contexts of 40, half of whose clusters are for averages."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, len(WORDS), (tokens // 40, 40))
    ids[:, 0] = 0
    cluster = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    return Text.of(Contexts(ids, cluster, ids > 0), tokens)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_what_a_group_explains_is_what_its_averages_explain(seed):
    rng = np.random.default_rng(seed)
    rows, features, groups = 60, 3, 8
    activations = np.where(rng.random((rows, features)) < 0.5, rng.random((rows, features)), 0).astype(np.float32)
    group, fitted = rng.integers(0, groups, rows), rng.random(rows) < 0.5
    found = explained(sparse.csr_array(activations), group, fitted)
    averages = pd.DataFrame(activations[fitted]).groupby(group[fitted]).mean()
    judged = ~fitted & np.isin(group, averages.index)
    for feature in range(features):
        own, mean = activations[judged, feature], activations[fitted, feature].mean() if fitted.any() else 0
        if mean == 0 or not (own > 0).any():
            assert np.isnan(found[feature])
            continue
        left = own - averages.loc[group[judged], feature].to_numpy()
        assert found[feature] == pytest.approx(1 - (left**2).sum() / ((own - mean) ** 2).sum(), rel=1e-4, abs=1e-4)


def test_groups_of_other_tokens_are_refused():
    activations, group = sparse.csr_array(np.eye(4)), np.array([0, 1, 1, 0])
    for lengths in ((4, 3), (3, 4), (5, 5)):
        of_groups, of_halves = (np.resize(each, length) for each, length in zip((group, group > 0), lengths, strict=True))
        with pytest.raises(ValueError, match="activations of 4"):
            explained(activations, of_groups, of_halves)


def test_planted_triggers_are_told_by_the_rule():
    where = text()
    rng = np.random.default_rng(1)
    strength = rng.uniform(0.9, 1.1, len(where.token))

    def on(*names):
        return np.isin(where.token, [WORDS.index(name) for name in names])

    planted = {
        "single token": on(" matrix"),
        "word family": on(" array", " arrays", " Array"),
        "punctuation": on("(", ","),
        "alike in form": on(" reshape", " repeat", " return"),
        "n-gram": on(" sum") & (where.previous == WORDS.index(" the")),
        "position": (where.position >= 3) & (where.position < 6),
        "bundle of tokens": on(" sum", " matrix", " the"),
        "wider context": rng.random(len(where.token)) < 0.1,
        "too rare": np.arange(len(where.token)) < 30,
    }
    activations = sparse.csr_array(np.stack(list(planted.values()), 1) * strength[:, None])
    found = triggers(activations, where, WORDS, FREQUENCY)
    assert found.trigger.tolist() == list(planted)
    assert tuple(planted) == CLASSES
    assert found.explained_token[0] > 0.95
    assert abs(found.null_token[0]) < 0.01
    assert found.top_share[0] == 1
    assert found.rarity[0] == pytest.approx(1)  # a tenth of the corpus
    assert found.tokens[2] == 2
    assert found.as_alike.isna().tolist() == [tokens < 2 for tokens in found.tokens]
    order = np.random.default_rng(0).permutation(len(planted))
    moved = triggers(activations[:, order], where, WORDS, FREQUENCY)
    assert moved.pop("feature").tolist() == found.pop("feature").tolist() == list(range(len(planted)))
    pd.testing.assert_frame_equal(moved, found.iloc[order].reset_index(drop=True))


def test_without_a_part_of_the_text_what_is_found_is_that_of_the_rest():
    where, rng = text(4_000), np.random.default_rng(2)
    activations = sparse.csr_array(np.where(rng.random((len(where.token), 3)) < 0.2, rng.random((len(where.token), 3)), 0))
    found = without_parts(activations, where, WORDS, FREQUENCY)
    assert found["left_out"].tolist() == [part for part in range(PARTS) for _ in range(3)]
    for part, own in found.groupby("left_out"):
        rest = where.part != part
        alone = triggers(activations[rest], where.at(rest), WORDS, FREQUENCY)
        shared = [column for column in own if column in alone]
        pd.testing.assert_frame_equal(own[shared].reset_index(drop=True), alone[shared])
        assert own["frequency"].to_numpy() == pytest.approx((activations[rest] > 0).mean(0))
    for half in (where.fitted, ~where.fitted):
        assert set(where.part[half]) == set(range(PARTS))
    first = np.arange(len(where.part)) // 39 * 39  # of the context, which is a cluster of its own here
    assert (where.part == where.part[first]).all()


@pytest.mark.parametrize(("contexts", "parts"), [(1, 1), (2, 1), (5, 2), (100, PARTS)])
def test_a_text_has_as_many_parts_as_its_clusters_allow(contexts, parts):
    where = text(40 * contexts)
    assert set(where.part) == set(range(parts))
    activations = sparse.csr_array(np.random.default_rng(0).random((len(where.token), 2)))
    found = without_parts(activations, where, WORDS, FREQUENCY)
    assert found["left_out"].nunique() == (parts if parts > 1 else 0)
    features = bands(seeds=3)
    if parts == 1:  # how far chance in such a text reaches can't be told
        assert np.isnan(delta(features, banding(features), "rarity", parts=[]).low)
        assert np.isnan(surface_share(features, banding(features), "unstable", parts=[]).low)


@pytest.mark.parametrize(
    ("tokens", "as_alike", "trigger"),
    [
        ([" naïve", "Naive"], 0.0, "word family"),
        ([" compute", "computing"], 0.0, "word family"),
        ([" is", " in"], CHANCE, "bundle of tokens"),
        ([" is", " in"], CHANCE - 0.01, "alike in form"),
        (["\n", " "], 0.0, "punctuation"),
        ([" x"], np.nan, "single token"),
    ],
)
def test_several_tokens_are_a_family_alike_or_a_bundle(tokens, as_alike, trigger):
    feature = {"firings": 100, "explained_position": 0, "explained_token": 0.9, "explained_n-gram": 0.9, "as_alike": as_alike}
    assert classify(feature, tokens) == trigger


def test_a_token_that_only_held_out_text_has_is_one_that_training_lacks():
    tokens = np.array([[0, 1, 1, 2]])
    found = training_shares(Contexts(tokens, np.zeros_like(tokens), np.array([[False, True, True, True]])), np.array([1, 6]), 3)
    assert found.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("tokens", "trigger"),
    [
        (["ा", "्"], "bundle of tokens"),  # vowel signs of Hindi: no punctuation
        (["ี"], "single token"),  # of Thai
        ([" …", "。"], "punctuation"),
        (["が", "か"], "bundle of tokens"),
        (["한국", "한글"], "bundle of tokens"),
        (["café", " Cafe"], "word family"),
        (["ﬁnal", "final"], "word family"),
    ],
)
def test_classes_follow_the_letters_of_every_script(tokens, trigger):
    feature = {"firings": 100, "explained_position": 0, "explained_token": 0.9, "explained_n-gram": 0.9, "as_alike": 1.0}
    assert classify(feature, tokens) == trigger


def banding(features: pd.DataFrame) -> Banding:
    """A stability that gives the features of a table, numbered seed by seed, the bands that they have there."""
    band = np.stack([part["band"].to_numpy() for _, part in features.groupby("seed")])
    matched = np.broadcast_to((band == "stable")[:, None], (len(band), *band.shape))
    best = torch.from_numpy(np.where(np.eye(len(band), dtype=bool)[:, :, None], np.nan, matched.astype(np.float32)))
    found = Stability(best, torch.zeros(best.shape, dtype=torch.int64), best, torch.ones(band.shape, dtype=torch.bool), 0.7)
    return Banding(found, sorted(features["seed"].unique()))


def bands(seeds: int = 6, count: int = 300, told: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """Unstable features that are rarer, and of which the token tells more by `told` at equal frequency."""
    rng, parts = np.random.default_rng(seed), []
    for number in range(seeds):
        unstable = rng.random(count) < 0.5
        frequency = np.exp(rng.normal(-6, 1, count) - unstable)
        tells = 0.4 - 0.05 * np.log(frequency / np.exp(-6)) + told * unstable + rng.normal(0, 0.05, count)
        columns = {
            "seed": number,
            "feature": np.arange(count),
            "band": np.where(unstable, "unstable", "stable"),
            "firings": 1000,
            "frequency": frequency,
        }
        columns |= {f"{what}_{name}": 0.0 for what in ("explained", "null") for name in ("previous", "n-gram", "position")}
        columns |= {"explained_token": tells, "null_token": 0.0, "top_share": 0.5, "rarity": 2.0}
        parts.append(pd.DataFrame(columns | {"trigger": np.where(tells > 0.5, "single token", "wider context")}))
    return pd.concat(parts, ignore_index=True)


def test_cliffs_delta_is_the_chance_of_more_less_that_of_less():
    one = bands(seeds=1, count=40)
    a, b = (one.loc[one.band == band, "explained_token"].to_numpy() for band in ("unstable", "stable"))
    assert cliffs_delta(one, "explained_token") == pytest.approx(np.sign(a[:, None] - b[None]).mean())
    assert cliffs_delta(one, "rarity") == 0
    assert np.isnan(cliffs_delta(one[one.band == "stable"], "rarity"))


def test_what_only_frequency_brings_about_is_gone_at_equal_frequency():
    only_frequency = compare(bands(told=0.0), banding(bands(told=0.0))).set_index(["features", "quantity"])
    assert only_frequency.delta_low["all", "explained_token"] > 0.2
    assert only_frequency.delta_low["equal frequency", "explained_token"] < 0.1
    assert abs(only_frequency.delta["equal frequency", "frequency"]) < 0.1
    pairs = at_equal_frequency(bands(seeds=1))
    assert (pairs.band == "unstable").sum() == (pairs.band == "stable").sum() > 50


def test_surface_and_chance_shares_count_features_that_are_not_too_rare():
    nothing = {f"null_{name}": 0.0 for name in ("token", "previous", "n-gram", "position")}
    rows = [
        {"seed": 0, "firings": FEWEST, "trigger": "single token", **nothing, "null_position": TELLS},  # one grouping is enough
        {"seed": 0, "firings": FEWEST, "trigger": "wider context", **nothing},
        *(3 * [{"seed": 0, "firings": FEWEST - 1, "trigger": "too rare", **dict.fromkeys(nothing, 1.0)}]),
        {"seed": 1, "firings": 1000, "trigger": "n-gram", **nothing, "null_token": TELLS - 0.01},
        {"seed": 1, "firings": 1000, "trigger": "position", **nothing, "null_token": 0.9, "null_previous": 0.9},
        {"seed": 1, "firings": 1000, "trigger": "alike in form", **nothing},
        {"seed": 1, "firings": 1000, "trigger": "bundle of tokens", **nothing},
        {"seed": 1, "firings": 1000, "trigger": "too rare", **nothing},
    ]
    features = pd.DataFrame(rows).assign(band="unstable")
    features = pd.concat([features, features.assign(band="stable", trigger="wider context")], ignore_index=True)
    features["feature"] = features.groupby("seed").cumcount()
    known = banding(features.sort_values(["seed", "feature"]))
    assert surface_share(features, known, "unstable").value == pytest.approx((1 / 2 + 3 / 5) / 2)  # the mean over seeds
    assert surface_share(features, known, "unstable", classes=WITH_BUNDLES).value == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert surface_share(features, known, "stable").value == 0
    assert surface_share(features, known, "unstable", less="stable").value == pytest.approx((1 / 2 + 3 / 5) / 2)
    assert surface_share(features, known, "unstable", less="shuffled").value == pytest.approx((1 / 2 - 1 / 2 + 3 / 5 - 1 / 5) / 2)
    assert set(WITH_BUNDLES) - set(SURFACE) == {"bundle of tokens"}
    assert by_chance(features, "unstable") == pytest.approx(2 / 7)
    assert np.isnan(by_chance(features, "intermediate"))


def test_how_often_features_fire_is_compared_of_the_rarest_too():
    features = bands()
    features.loc[features["band"] == "unstable", "firings"] = FEWEST - 1
    assert delta(features, banding(features), "frequency").value < 0
    assert np.isnan(delta(features, banding(features), "rarity").value)


def test_intervals_of_c5_reach_as_far_as_the_text_moves_them_too():
    features, rng = bands(seeds=4), np.random.default_rng(3)
    known, parts = banding(features), []
    for _ in range(PARTS):  # seeds read the same text, so what it does to unstable features it does in all of them
        told, moved = features["explained_token"], rng.normal(0, 0.05, 3)[:, None] * (features["band"] == "unstable").to_numpy()
        columns = {"explained_token": told + moved[0], "rarity": features["rarity"] + rng.random() * moved[1]}
        columns |= {"frequency": features["frequency"] * np.exp(5 * moved[2])}
        trigger = np.where(columns["explained_token"] > TELLS, "single token", "wider context")
        parts.append(features.assign(**columns, trigger=trigger))

    def reach(of_part: Callable[[pd.DataFrame], float]) -> float:
        found = np.array([np.mean([of_part(own) for _, own in part.groupby("seed")]) for part in parts])
        return stats.t.ppf(0.975, PARTS - 1) * np.sqrt((PARTS - 1) / PARTS * np.square(found - found.mean()).sum())

    def share(own: pd.DataFrame) -> float:
        return (own.loc[own["band"] == "unstable", "trigger"] == "single token").mean()

    alone, both = (surface_share(features, known, "unstable", parts=of) for of in (None, parts))
    assert both.value == alone.value
    assert both.low == pytest.approx(both.value - np.hypot(alone.value - alone.low, reach(share)))
    assert both.high > alone.high
    alone, both = (delta(features, known, "explained_token", parts=of) for of in (None, parts))
    token = reach(lambda own: cliffs_delta(own, "explained_token"))
    assert both.low == pytest.approx(both.value - np.hypot(alone.value - alone.low, token))
    for line, bare in zip(judge_c5(features, known, parts), judge_c5(features, known), strict=True):
        for condition, alone in zip(line["conditions"], bare["conditions"], strict=True):
            assert condition["value"] == alone["value"]
            assert condition["ci_low"] < alone["ci_low"] or alone["ci_low"] == -1, condition
    table = compare(features, known, parts).set_index(["features", "quantity"])
    assert table.delta_low["all", "explained_token"] == pytest.approx(both.low)


def test_where_nothing_can_be_judged_there_are_no_pairs():
    assert paired(bands(seeds=2)[:0]).empty


def test_pairs_of_equal_frequency_are_no_matter_of_the_text():
    features, rng = bands(seeds=3), np.random.default_rng(4)
    known = banding(features)
    parts = [features.assign(frequency=features["frequency"] * np.exp(rng.normal(0, 0.1, len(features)))) for _ in range(PARTS)]
    alone, both = (delta(features, known, "explained_token", equal_frequency=True, parts=of) for of in (None, parts))
    assert both.low == pytest.approx(alone.low)  # other frequencies would pair others, and what the token tells is the same


def test_c5_holds_where_it_is_planted_and_each_line_says_its_own():
    features = bands(told=0.4)
    features["rarity"] = 2.0 + (features["band"] == "unstable") + np.linspace(0, 0.1, len(features))
    assert [line["verdict"] for line in judge_c5(features, banding(features))] == ["supported"] * 3
    frequent = features.assign(frequency=1 / features["frequency"])
    assert judge_c5(frequent, banding(frequent))[0]["verdict"] == "opposite"
    bundles = features.replace({"trigger": {"single token": "bundle of tokens"}})
    assert judge_c5(bundles, banding(bundles))[0]["verdict"] == "depends on the definition"
    nothing = bands().assign(band="stable")
    assert judge_c5(nothing, banding(nothing))[0]["verdict"] == "inconclusive"


def test_what_the_quick_study_says_of_triggers_counts_chance_in_the_text(quick):
    table, parts, of = experiment.by_band(quick.main), experiment.without_parts(quick.main), experiment.bands(quick.main)
    assert len(parts) == PARTS
    for part in parts:
        both = table.merge(part, on=["seed", "feature"], suffixes=("", "_left"))
        assert len(both) == len(table)
        assert (both.firings_left <= both.firings).all()
        assert both.null_token_left.equals(both.null_token)
        assert both.frequency_left.corr(both.frequency) > 0.98
        assert both.explained_token_left.corr(both.explained_token) > 0.9
    paired = quick.table("triggers").query("equal_frequency")  # those that deltas at equal frequency are of
    assert (paired.firings >= FEWEST).all()
    sizes = paired.groupby(["seed", "band"]).size().unstack()
    assert (sizes["stable"] == sizes["unstable"]).all()
    share, tells = surface_share(table, of, "unstable", parts=parts), delta(table, of, "explained_token", parts=parts)
    assert share.low < surface_share(table, of, "unstable").low
    surface, deltas = (
        quick.table("surface").set_index(["definition", "band"]),
        quick.table("deltas").set_index(["features", "quantity"]),
    )
    assert surface.share_low["strict", "unstable"] == pytest.approx(share.low)
    assert deltas.delta_low["all", "explained_token"] == pytest.approx(tells.low)
    assert quick.claim("C5")["ci_low"] == pytest.approx(share.low, abs=1e-5)
