"""Worlds with known features: what they are made of, what is measured of them, and the theory, against closed forms."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import drawn
from sae_stability.book import page
from sae_stability.experiments import synthetic as experiment
from sae_stability.experiments.synthetic import (
    INVARIANT,
    INVARIANT_TIGHT,
    ISOLATED,
    SLACK,
    TIGHT,
    judge_c8,
    judged_worlds,
    phase_diagram,
)
from sae_stability.figures import synthetic as figures
from sae_stability.matching.theory import expected_stability
from sae_stability.statistics import jackknifed_mean
from sae_stability.synthetic import FOUND, Recovery, World, coding_error, measure, measure_all, recovery, trained

SMALL = World(r=4, isolated=6, isolated_active=1, blocks=2, tokens=1024)


def tokens(world: World, count: int = 4000) -> torch.Tensor:
    return world.activations(count, draw=1).double()


def test_isolated_features_and_blocks_lie_at_right_angles():
    truth = replace(SMALL, rare=3).truth
    alone = torch.cat([truth.isolated, truth.rare])
    assert alone @ alone.T == pytest.approx(torch.eye(9), abs=1e-5)
    for space, features in zip(truth.spaces, truth.in_blocks, strict=True):
        assert space.T @ space == pytest.approx(torch.eye(4), abs=1e-5)
        assert (alone @ space).abs().max() < 1e-5
        assert (features @ space).norm(dim=1) == pytest.approx(torch.ones(8), abs=1e-5)  # inside their block
    assert (truth.spaces[0].T @ truth.spaces[1]).abs().max() < 1e-5
    crowded = replace(SMALL, crowded=True)
    assert crowded.d_in < SMALL.d_in
    assert (crowded.truth.isolated @ crowded.truth.spaces[0]).abs().max() > 0.1


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_as_many_features_are_active_as_a_world_says(active, isolated_active, seed):
    world = replace(SMALL, active=active, isolated_active=isolated_active, seed=seed)
    x, truth = tokens(world, 200), world.truth
    assert (((x @ truth.isolated.double().T).abs() > 0.4).sum(1) == isolated_active).all()
    in_spaces = torch.stack([(x @ space.double()).norm(dim=1) for space in truth.spaces])
    assert ((in_spaces > 1e-4).sum(0) == 1).all()  # one block a token
    assert world.l0 == isolated_active + active
    if active == 1:
        nearest = F.normalize(x @ truth.spaces[0].double(), dim=1) @ (truth.in_blocks[0] @ truth.spaces[0]).double().T
        assert nearest[in_spaces[0] > 1e-4].amax(1) == pytest.approx(torch.ones(int((in_spaces[0] > 1e-4).sum())).double())


def test_a_block_without_preferred_directions_has_none():
    x = tokens(SMALL, 60_000) @ SMALL.truth.spaces[0].double()
    x = F.normalize(x[x.norm(dim=1) > 1e-4], dim=1)
    assert x.T @ x / len(x) == pytest.approx(torch.eye(4).double() / 4, abs=0.01)
    fourth = (x**4).mean(0)
    assert fourth == pytest.approx(torch.full((4,), 3 / (4 * 6)).double(), abs=0.01)  # that of a uniform direction: 3 / (r (r + 2))


def test_frequencies_follow_zipf_and_rare_features_are_rare():
    world = replace(SMALL, zipf=1.0, rare=2, rare_frequency=0.05)
    x = tokens(world, 40_000)
    often = ((x @ world.truth.isolated.double().T) > 0.4).double().mean(0)
    assert often == pytest.approx(1 / torch.arange(1, 7).double() / (1 / torch.arange(1, 7).double()).sum(), abs=0.01)
    assert ((x @ world.truth.rare.double().T) > 0.4).double().mean(0) == pytest.approx(torch.full((2,), 0.05).double(), abs=0.005)


def test_partners_fire_together_and_children_with_their_parents_only():
    def active(world: World) -> torch.Tensor:
        return (tokens(world, 20_000) @ world.truth.isolated.double().T) > 0.4

    fires = active(replace(SMALL, together=0.5))
    assert fires[fires[:, 0], 1].double().mean() == pytest.approx(2 / 3, abs=0.03)  # half of the own ones, and all that it called
    world = replace(SMALL, hierarchy=True, isolated_active=2)
    fires = active(world)
    assert not (fires[:, 1::2] & ~fires[:, 0::2]).any()
    assert fires[fires[:, 0], 1].double().mean() == pytest.approx(0.5, abs=0.03)
    assert fires.double().sum(1).mean() == pytest.approx(world.l0 - world.r, abs=0.02)


def test_noise_has_the_length_that_is_asked_for():
    quiet = replace(SMALL, isolated_active=0, blocks=0, noise=0.5)
    assert tokens(quiet).square().sum(1).mean().sqrt() == pytest.approx(0.5, rel=0.02)


def test_what_is_trained_has_the_budget_and_the_width_of_the_world():
    world = World(r=8, active=2, budget=1.5, width=0.5, tokens=1_500_000)
    assert (world.k, world.d_sae, world.l0, world.true_features) == (6, 28, 4, 56)
    assert (world.recipe.k, world.recipe.d_sae) == (6, 28)
    assert world.recipe.tokens * world.recipe.passes == 1_500_000
    assert (replace(world, tokens=400_000).recipe.tokens, replace(world, tokens=400_000).recipe.passes) == (200_000, 2)
    assert replace(world, active=None).l0 == 10


def test_the_same_world_gives_the_same_tokens_and_another_others():
    assert torch.equal(SMALL.activations(50, draw=1), SMALL.activations(50, draw=1))
    assert not torch.equal(SMALL.activations(50, draw=1), SMALL.activations(50, draw=2))
    other = replace(SMALL, seed=1)
    assert not torch.allclose(SMALL.truth.isolated, other.truth.isolated)


# Theory


@pytest.mark.parametrize(("r", "latents"), [(3, 6), (8, 16), (12, 24)])
def test_the_stability_of_random_directions_is_that_of_the_theory(r, latents):
    one, other = F.normalize(drawn(4000, r), dim=1), F.normalize(drawn(4000, latents, r, seed=1), dim=2)
    found = (torch.einsum("nr,nlr->nl", one, other).amax(1) >= 0.7).double().mean()
    assert expected_stability(r, latents) == pytest.approx(float(found), abs=0.025)


def test_the_theory_gives_the_values_that_were_worked_out():
    assert [round(expected_stability(r, 2 * r), 2) for r in (4, 8, 12)] == [0.55, 0.25, 0.09]


def test_no_rotation_of_a_dictionary_is_worse_where_no_direction_is_preferred():
    v, D = drawn(800, 3).double().numpy(), F.normalize(drawn(6, 3, seed=1), dim=1).double().numpy()
    turned = D @ torch.linalg.qr(drawn(3, 3, seed=2))[0].double().numpy()
    assert coding_error(v, turned, 1) == pytest.approx(coding_error(v, D, 1), rel=0.08)
    assert coding_error(v, D, 1) > 0.1


def test_with_budget_to_spare_one_direction_more_than_dimensions_codes_everything():
    simplex = np.vstack([np.eye(3), -np.ones(3) / 3**0.5])
    features = F.normalize(drawn(6, 3, seed=1), dim=1).double().numpy()
    sparse_law = (0.5 + np.random.default_rng(0).random((100, 1))) * features[np.arange(100) % 6]
    for v in (drawn(100, 3).double().numpy(), sparse_law):
        assert coding_error(v, simplex, 3) == pytest.approx(0, abs=1e-12)
        assert coding_error(v, simplex, 2) > 0.01
    assert coding_error(sparse_law, features, 1) == pytest.approx(0, abs=1e-12)  # tight and sparse: the truth


# What is measured


def test_the_truth_is_recovered_by_itself_and_its_rotation_only_as_a_space():
    world = World(r=8, rare=4, active=1)
    truth = world.truth
    spare = F.normalize(drawn(3, 5, world.d_in), dim=2)
    itself = torch.cat([truth.features.expand(3, -1, -1), spare], 1)
    alive = torch.ones(itself.shape[:2], dtype=torch.bool)
    found = recovery(truth, itself, alive)
    assert (found.found_isolated, found.found_rare, found.found_in_blocks) == (1, 1, 1)
    assert found.subspace == pytest.approx(1)
    assert found.latents == pytest.approx(16)
    assert found.p_isolated == found.p_in_blocks == 1
    assert found.stable_false == 0
    turned = torch.stack(
        [torch.cat([truth.isolated, truth.rare, *(_turned(truth, block, seed) for block in (0, 1))]) for seed in range(3)]
    )
    found = recovery(truth, turned, alive[:, : turned.shape[1]])
    assert found.found_in_blocks < 0.1
    assert found.subspace == pytest.approx(1)
    assert found.p_in_blocks < 0.5


def _turned(truth, block: int, seed: int) -> torch.Tensor:
    rotation = torch.linalg.qr(drawn(8, 8, seed=10 * seed + block))[0]
    return truth.in_blocks[block] @ truth.spaces[block] @ rotation @ truth.spaces[block].T


def test_a_space_that_has_fewer_latents_than_dimensions_is_spanned_in_part_and_dead_latents_span_nothing():
    world = World(r=8, blocks=1, isolated=4, isolated_active=1)
    truth = world.truth
    few = torch.cat([truth.isolated, truth.spaces[0].T[:3]]).expand(2, -1, -1)
    alive = torch.ones(few.shape[:2], dtype=torch.bool)
    assert recovery(truth, few, alive).subspace == pytest.approx(3 / 8)
    alive[:, -1] = False
    found = recovery(truth, few, alive)
    assert found.subspace == pytest.approx(2 / 8)
    assert found.latents == 2


def test_what_all_seeds_merge_alike_is_stable_and_false():
    truth = World(blocks=0, isolated=4).truth
    merged = F.normalize(truth.isolated[0] + truth.isolated[1], dim=0)
    W_dec = torch.stack([merged, truth.isolated[2]]).expand(3, -1, -1)
    found = recovery(truth, W_dec, torch.ones(3, 2, dtype=torch.bool))
    assert found.stable_false == 0.5
    assert found.found_isolated == 0.25
    assert found.p_others == 1
    assert np.isnan(found.p_in_blocks)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_no_order_of_latents_and_no_rotation_of_the_world_matters(seed):
    world = replace(SMALL, active=1, rare=2)
    truth, W_dec = (
        world.truth,
        F.normalize(drawn(3, 30, world.d_in, seed=seed) / 5 + world.truth.features[:22].repeat(2, 1)[:30], dim=2),
    )
    alive = drawn(3, 30, seed=seed) > -1
    order, turned = torch.randperm(30), torch.linalg.qr(drawn(world.d_in, world.d_in, seed=seed))[0]
    rotated = type(truth)(truth.isolated @ turned, truth.rare @ turned, truth.in_blocks @ turned, turned.T @ truth.spaces)
    before = recovery(truth, W_dec, alive)
    after = recovery(rotated, (W_dec @ turned)[:, order], alive[:, order])
    assert vars(after) == pytest.approx(vars(before), abs=1e-4, nan_ok=True)


# Training


def test_isolated_features_are_found_and_a_world_is_measured_alike_twice():
    world = World(blocks=0, isolated=8, isolated_active=1, tokens=60_000)
    found = measure(world, 3)
    assert found["found_isolated"] > 0.95
    assert found["explained_variance"] > 0.95
    assert found["p_isolated"] > 0.95
    again = measure_all([world], 3, "").iloc[0]
    assert again["explained_variance"] == found["explained_variance"]
    assert again["seeds"] == 3


def test_saes_that_start_from_the_truth_have_it_before_the_first_step():
    world = World(active=1, isolated=8, blocks=1, tokens=512, from_truth=True)
    begun = trained(world, [0, 1])  # one step
    features = world.truth.features
    assert (F.normalize(begun.W_dec[:, : len(features)], dim=2) * features).sum(2).min() > 0.99
    other = trained(replace(world, from_truth=False), [0, 1])
    b_dec = begun.to_raw(begun.parameters.b_dec)
    assert b_dec.norm(dim=1).max() < 0.2  # tokens are sums of features and nothing else
    assert ((other.W_dec @ features.T).amax(1) > FOUND).float().mean() < 0.5


# The rule and the diagram


def test_worlds_of_the_rule_are_none_of_the_diagram():
    judged = {world for worlds in judged_worlds(500_000).values() for world in worlds}
    diagram = {world for worlds in phase_diagram().values() for world in worlds}
    assert not {world.seed for world in judged} & {world.seed for world in diagram}
    assert len(diagram) >= 300
    kinds = judged_worlds(1000)
    assert all(2 * world.active <= world.r for world in kinds[TIGHT])
    assert all(world.r >= 8 and world.active is None for world in kinds[INVARIANT] + kinds[INVARIANT_TIGHT])
    in_block = {kind: [world.k - world.isolated_active - world.r for world in kinds[kind]] for kind in kinds if kind != ISOLATED}
    assert all(spare >= 0 for spare in in_block[INVARIANT] + in_block[SLACK])
    assert all(spare < 0 for spare in in_block[TIGHT] + in_block[INVARIANT_TIGHT])
    drawn_alone = [world.seed for kind, worlds in kinds.items() if kind != SLACK for world in worlds]
    assert len(set(drawn_alone)) == len(drawn_alone)
    same = {replace(world, budget=1.0) for world in kinds[SLACK]}  # with a tight budget
    assert same <= {world for world in kinds[TIGHT] if world.active == 1}
    assert [world.r for world in kinds[SLACK]].count(8) == len(same) / 2


def test_the_published_phase_diagram_is_of_the_worlds_of_the_code():
    published, slices = page.rows("worlds/worlds"), phase_diagram()
    assert list(published["slice"]) == [name for name, worlds in slices.items() for _ in worlds]
    fields = list(World.__dataclass_fields__)
    assert not set(fields) & set(Recovery.__dataclass_fields__)  # a column of the table says one thing
    expected = pd.DataFrame([vars(world) for worlds in slices.values() for world in worlds])[fields]
    pd.testing.assert_frame_equal(published[fields], expected, check_dtype=False)
    assert (published["seeds"] == experiment.DIAGRAM_SEEDS).all()
    assert not published[["found_isolated", "explained_variance"]].isna().any().any()


def test_the_jackknifed_mean_of_worlds_has_students_interval():
    values = [0.1, 0.3, 0.2, 0.25]
    error = np.std(values, ddof=1) / 2 * 3.182446305284263  # t(3) at 97.5 %
    found = jackknifed_mean(values)
    assert (found.value, found.high - found.value) == pytest.approx((np.mean(values), error))


SUPPORTED = {
    INVARIANT: {"found_in_blocks": 0.01, "subspace": 0.99, "p_in_blocks": 0.3, "expected_p": 0.26},
    TIGHT: {"found_in_blocks": 0.95},
    INVARIANT_TIGHT: {"found_in_blocks": 0.05},
    SLACK: {"found_in_blocks": 0.2},
}


@pytest.mark.parametrize(
    ("kind", "changed", "verdicts"),
    [
        (INVARIANT, {}, ["supported", "supported", "supported"]),
        (INVARIANT, {"found_in_blocks": 0.3}, ["weaker than the bound", "supported", "supported"]),
        (INVARIANT, {"subspace": 0.7}, ["weaker than the bound", "supported", "supported"]),
        (INVARIANT, {"p_in_blocks": 0.5}, ["weaker than the bound", "supported", "supported"]),
        (TIGHT, {"found_in_blocks": 0.8}, ["supported", "weaker than the bound", "supported"]),
        (TIGHT, {"found_in_blocks": 0.04}, ["supported", "opposite", "opposite"]),
        (INVARIANT_TIGHT, {"found_in_blocks": 0.99}, ["supported", "opposite", "supported"]),
        (SLACK, {"found_in_blocks": 0.99}, ["supported", "supported", "opposite"]),
    ],
)
def test_each_condition_of_c8_counts(kind, changed, verdicts):
    rows = [
        {"kind": each, "seed": seed, **SUPPORTED[each], **(changed if each == kind else {})}
        for each in SUPPORTED
        for seed in range(4)
    ]
    worlds = pd.DataFrame(rows)
    worlds[["found_in_blocks", "subspace", "p_in_blocks"]] += 1e-3 * np.random.default_rng(0).normal(size=(len(worlds), 1))
    lines = judge_c8(worlds)
    assert [line["verdict"] for line in lines] == verdicts
    assert all(line["scope"] == experiment.SCOPE for line in lines)


def test_the_quick_study_judges_c8_on_all_its_worlds(quick):
    worlds = quick.table("worlds")
    assert worlds["kind"].value_counts().to_dict() == {ISOLATED: 2, INVARIANT: 4, TIGHT: 24, INVARIANT_TIGHT: 6, SLACK: 6}
    assert len(quick.table("diagram")) == 15
    assert [line["line"] for line in quick.claims("C8")] == ["as stated", "beyond size and noise", "beyond energy and frequency"]


def test_figures_draw_what_was_found():
    worlds = pd.DataFrame({"found_in_blocks": [0.1, 0.2], "subspace": [0.9, 1.0], "found_isolated": [1.0, np.nan]})
    (axis,) = figures.found_and_spanned(
        {"one kind": worlds, "other": worlds}, {"found_in_blocks": "found", "found_isolated": "alone"}, "title"
    ).axes
    drawn_values = [list(line.get_xdata()) for line in axis.lines if line.get_marker() in "os"]
    assert drawn_values == [[0.1, 0.2], [0.1, 0.2], [1.0], [1.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["other", "one kind"]
    theory = pd.DataFrame({"r": [8, 12], "expected_p": [0.3, 0.1], "p_in_blocks": [0.4, 0.2]})
    (axis,) = figures.against_theory(theory, "title").axes
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines[:2]] == [(0.3, 0.4), (0.1, 0.2)]
    plane = pd.DataFrame({"law": ["1", "1", "any"], "budget": [1.0, 1.0, 2.0], "found_in_blocks": [0.8, 0.6, 0.0]})
    axis = figures.phase(plane, "law", "budget", "found_in_blocks", ("active", "budget", "share"), "title").axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.70", "0.00"]  # means of draws, and nothing where no world is
    laws = pd.DataFrame({"active": [1, np.nan], "found_in_blocks": [0.9, 0.0], "p_in_blocks": [0.95, 0.3]})
    (axis,) = figures.stable_or_true(laws, "title").axes
    assert [(line.get_label(), line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines[:2]] == [
        ("no preferred directions", 0.0, 0.3),
        ("1 active at a time", 0.9, 0.95),
    ]


def test_what_one_seed_finds_is_what_it_finds_in_company_and_it_has_no_stability():
    world = World(active=1, isolated=8, blocks=1, tokens=20_000)
    W_dec = trained(world, [0, 1]).W_dec
    alive = torch.ones(W_dec.shape[:2], dtype=torch.bool)
    both, *each = (recovery(world.truth, W_dec[seeds], alive[seeds]) for seeds in ([0, 1], [0], [1]))
    for name in ("found_isolated", "found_in_blocks", "subspace", "latents"):
        assert getattr(both, name) == pytest.approx(np.mean([getattr(alone, name) for alone in each])), name
    assert both.p_isolated >= 0
    for alone in each:
        assert np.isnan([alone.p_isolated, alone.p_in_blocks, alone.p_others, alone.stable_false]).all()
