"""What the setup chapter shows of a model's activations, against the activations themselves."""

import numpy as np
import pytest
import torch

from sae_stability.experiments import texts


def test_norms_are_those_of_the_activations_that_saes_see(quick):
    table = quick.table("norms")
    everywhere = table[table["position"] == -1].iloc[0]
    held_out = texts.activations(quick.main, "evaluation").data[:100_000].float()
    norms = held_out.norm(dim=1)
    assert everywhere["tokens"] == len(norms)
    assert everywhere["median"] == pytest.approx(norms.median().item(), rel=1e-3)
    assert everywhere["longest"] == pytest.approx((norms.max() / norms.median()).item(), rel=1e-3)
    assert table.loc[table["position"] != -1, "tokens"].sum() == len(norms)
    assert 0 not in set(table["position"])  # BOS is no text
    assert everywhere["left_out"] == 0


def test_the_shares_of_the_axes_are_those_of_the_covariance(quick):
    axes = quick.table("axes")
    held_out = texts.activations(quick.main, "evaluation").data[:100_000].double()
    variances = torch.linalg.eigvalsh(torch.cov(held_out.T)).flip(0)
    np.testing.assert_allclose(axes["share"], (variances / variances.sum())[: len(axes)], rtol=1e-3)
    assert axes["share"].is_monotonic_decreasing
