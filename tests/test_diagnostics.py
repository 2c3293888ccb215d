"""The reverse test, on directions whose kind is known."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from sae_stability import diagnostics
from sae_stability.book import page
from sae_stability.diagnostics import BLOCK, DIAGNOSTICS, LEFT_OVER, OWN, TOGETHER, diagnose, told_apart, unstable_latents
from sae_stability.experiments.synthetic import MIXED_SEEDS, mixed_worlds
from sae_stability.matching import stability
from sae_stability.synthetic import World, trained

D_IN, SEEDS = 64, 4


def turned_and_noisy() -> torch.Tensor:
    """[seed, 32, d_in]: 16 random axes of one block of 12 dimensions, and 16 copies of isolated features under much noise."""
    generator = torch.Generator().manual_seed(0)
    space = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator))[0].T
    block, isolated = space[:12], space[12:28]
    axes = F.normalize(torch.randn(SEEDS, 16, 12, generator=generator), dim=2) @ block
    noise = F.normalize(torch.randn(SEEDS, 16, D_IN, generator=generator), dim=2)
    return torch.cat([axes, F.normalize(isolated + noise, dim=2)], 1)


def test_turned_axes_are_spanned_by_another_seeds_and_noisy_copies_gain_by_averages():
    W_dec = turned_and_noisy()
    found = stability(W_dec, 0.95)  # nothing comes back: all are unstable
    table = diagnose(W_dec, found)
    assert len(table) == SEEDS * 32
    turned, noisy = (table[in_block] for in_block in (table["feature"] < 16, table["feature"] >= 16))
    assert turned["spanned"].min() > noisy["spanned"].max()
    assert noisy["averaged"].mean() == pytest.approx(0, abs=0.05)
    assert turned["averaged"].mean() < -0.1
    expected = [float(found.best_cosine[0, t, 3]) for t in (1, 2, 3)]
    assert table.iloc[3]["best"] == pytest.approx(np.mean(expected))


def test_what_is_spanned_is_the_length_of_a_projection_and_turns_with_the_space():
    W_dec = turned_and_noisy()
    found = stability(W_dec, 0.95)
    table, i = diagnose(W_dec, found), 5
    shares = []
    for t in (1, 2, 3):
        near = np.argsort(-(W_dec[t] @ W_dec[0, i]).abs().numpy())[: diagnostics.NEIGHBOURS]
        basis = W_dec[t, near.tolist()].double().numpy().T
        projected = basis @ np.linalg.lstsq(basis, W_dec[0, i].double().numpy(), rcond=None)[0]
        shares.append(projected @ projected)
    assert table.iloc[i]["spanned"] == pytest.approx(np.mean(shares), abs=1e-5)
    rotation = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1)))[0]
    pd.testing.assert_frame_equal(diagnose(W_dec @ rotation, stability(W_dec @ rotation, 0.95)), table, atol=1e-4, rtol=0)


def test_as_many_as_are_asked_for_are_taken_and_span_less():
    W_dec = turned_and_noisy()
    found = stability(W_dec, 0.95)
    some, every = diagnose(W_dec, found, [12, 10, 9, 10]), diagnose(W_dec, found)
    assert some.groupby("seed").size().tolist() == [12, 10, 9, 10]
    both = some.merge(every, on=["seed", "feature"], suffixes=("", "_of_all"))
    assert (both["best"] == both["best_of_all"]).all()
    assert both["spanned"].mean() < both["spanned_of_all"].mean()


def test_a_seed_without_unstable_features_spans_nothing():
    W_dec = turned_and_noisy()
    assert (diagnostics._spanned(W_dec[0], W_dec[1, :0]) == 0).all()
    assert diagnostics._spanned(W_dec[0], W_dec[0, :3])[:3] == pytest.approx(1, abs=1e-5)


def test_a_diagnostic_that_tells_has_an_area_of_one_and_one_that_does_not_of_a_half():
    generator = np.random.default_rng(0)
    of_block = generator.random(4000) < 0.4
    latents = pd.DataFrame({name: generator.random(4000) for name in DIAGNOSTICS})
    kind = np.where(of_block, BLOCK, OWN)
    latents = latents.assign(kind=kind, world=np.arange(4000) % 4, spanned=of_block + 0.1 * generator.random(4000))
    others = [latents.assign(world=9, kind=BLOCK), latents.assign(kind=LEFT_OVER, spanned=1 - latents["spanned"])]
    areas = told_apart(pd.concat([latents, *others]), OWN).set_index("diagnostic")  # what is of another kind plays no part
    assert areas.loc["spanned", "roc"] == areas.loc["spanned", "roc_low"] == 1
    assert areas.loc[TOGETHER, "roc"] == pytest.approx(1, abs=1e-6)
    assert areas.loc["best", "roc"] == pytest.approx(0.5, abs=0.05)
    assert areas.loc["best", "roc_low"] < areas.loc["best", "roc"] < areas.loc["best", "roc_high"]


def test_latents_are_called_by_what_they_are():
    world = World(r=12, isolated=40, isolated_active=2, zipf=1.0, noise=0.5, width=0.5, tokens=60_000)
    table = unstable_latents(world, 4)
    directions, truth = F.normalize(trained(world, range(4)).W_dec.float(), dim=2), world.truth
    assert (table["kind"] == BLOCK).any()
    for _, row in table.iterrows():
        direction = directions[row["seed"], row["feature"]]
        inside = max(float((space.T @ direction).norm()) for space in truth.spaces)
        nearest = float((truth.isolated @ direction).max())
        assert row["kind"] == (BLOCK if inside >= 0.9 else OWN if nearest >= 0.7 else LEFT_OVER)


def test_the_published_latents_are_of_the_worlds_of_the_code():
    published = page.rows("worlds/latents")
    assert published["world"].nunique() == len(mixed_worlds())
    assert set(published["seed"]) == set(range(MIXED_SEEDS))
    counts = published.groupby(["world", "kind"]).size().unstack()
    assert (counts[[BLOCK, OWN]].min() >= 5).all()
