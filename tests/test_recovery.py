"""What pools find of worlds whose features are known."""

import pytest
import torch

from sae_stability import recovery
from sae_stability.pooling import pool
from sae_stability.synthetic import FOUND, HELD_OUT, World, trained


@pytest.fixture(scope="module")
def many():
    """A world with twice as many features as an SAE has latents, of which each seed finds some."""
    return World(blocks=0, isolated=60, isolated_active=2, width=0.5, tokens=150_000)


def test_a_union_finds_more_true_features_than_any_single_sae_at_a_like_precision(many):
    found = recovery.pooled(many, 4).set_index("product")
    assert found.loc["union", "found"] > found.loc[recovery.BEST, "found"] + 0.1
    assert found.loc["union", "precision"] > found.loc[recovery.SINGLE, "precision"] - 0.03
    assert found.loc[recovery.BEST, "found"] >= found.loc[recovery.SINGLE, "found"]
    assert found.loc["width", "features"] <= many.d_sae


def test_what_is_found_agrees_with_a_count(many):
    found = recovery.pooled(many, 4).set_index("product")
    ensemble, x, truth = trained(many, range(4)), many.activations(HELD_OUT, draw=2), many.truth.features
    saes = [ensemble.dictionary(one) for one in range(4)]
    shares, precisions, features = [], [], []
    for group in (saes[:2], saes[2:]):
        union = pool(group, x, "union").sae
        fires = (union.encode(x) > 0).any(0)
        cosines = torch.nn.functional.normalize(union.directions[fires], dim=1) @ truth.T
        shares.append(float((cosines.amax(0) >= FOUND).double().mean()))
        precisions.append(float((cosines.amax(1) >= FOUND).double().mean()))
        features.append(int(fires.sum()))
    assert found.loc["union", "found"] == pytest.approx(sum(shares) / 2)
    assert found.loc["union", "precision"] == pytest.approx(sum(precisions) / 2)
    assert found.loc["union", "features"] == sum(features) / 2


def test_pools_do_not_tell_what_can_not_be_told():
    found = recovery.pooled(World(r=8, tokens=150_000), 4).set_index("product")
    assert (found.loc[["union", "consensus", "width"], "found_in_blocks"] < 0.15).all()
    assert (found.loc[["union", "width"], "subspace"] > 0.9).all()
    assert found.loc["union", "latents"] > 1.5 * found.loc[recovery.SINGLE, "latents"]  # axes of each seed stand side by side


def test_several_worlds_are_told_apart(many):
    found = recovery.pooled_all([many, many], 4, "pools")
    assert found["world"].tolist() == [0] * 5 + [1] * 5
    assert (
        found.loc[found["world"] == 0]
        .drop(columns="world")
        .equals(found.loc[found["world"] == 1].drop(columns="world").reset_index(drop=True))
    )
