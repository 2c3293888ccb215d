"""Correlations with partners against NumPy, and what the table and the figure make of them."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_stability.experiments.activity import partner_correlations
from sae_stability.figures import activity as figures


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_correlations_with_partners_are_numpy_s(seed):
    rng = np.random.default_rng(seed)
    ours, theirs = (rng.random((300, 6)) * (rng.random((300, 6)) < 0.4) for _ in range(2))
    ours[:, 5] = 0  # never fires
    theirs[:, 4] = np.arange(300) < 49  # too rarely to tell
    partner = rng.integers(-1, 6, size=6)
    found = partner_correlations(sparse.csc_array(ours), sparse.csc_array(theirs), partner)
    for feature, other in enumerate(partner):
        if other in (-1, 4) or feature == 5:
            assert np.isnan(found[feature])
        else:
            np.testing.assert_allclose(found[feature], np.corrcoef(ours[:, feature], theirs[:, other])[0, 1], atol=1e-6)


def test_a_feature_correlates_with_itself_and_partners_may_be_shared():
    codes = sparse.csc_array(np.tile([[1.0, 0, 2], [0, 3, 0], [2, 0, 4], [0, 1, 0]], (25, 1)))
    np.testing.assert_allclose(partner_correlations(codes, codes, np.array([0, 1, 0])), 1, atol=1e-12)
    assert partner_correlations(codes, codes, np.array([1, 1, 1]))[0] < 0


def test_only_matches_count_and_seeds_are_left_out_one_at_a_time(quick):
    features, agreement = quick.table("activity"), quick.table("agreement").set_index("kind")
    threshold = quick.cell.threshold
    assert (features["cosine"] >= threshold - 1e-5).all()
    assert features["correlation"].between(-1, 1 + 1e-6).all()
    for kind, part in features.groupby("kind"):
        weights = part["matches"] / part["matches"].sum()
        np.testing.assert_allclose(agreement.loc[kind, "correlation"], (part["correlation"] * weights).sum(), atol=1e-5)
        assert agreement.loc[kind, "matches"] == part["matches"].sum()
    real = agreement.loc["real"]
    assert real["correlation_low"] < real["correlation"] < real["correlation_high"]


def test_the_figure_draws_the_median_of_each_bin():
    table = pd.DataFrame(
        {"kind": "real", "cosine": np.repeat([0.75, 0.93], 10), "correlation": [*[0.2] * 10, *np.linspace(0.5, 0.9, 10)]}
    )
    (axis,) = figures.correlation_by_cosine(table, 0.7, "title").axes
    line = axis.lines[0]
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.7])
    assert abs(line.get_xdata()[0] - 0.745) < 0.02
