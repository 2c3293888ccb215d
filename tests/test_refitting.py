"""Decoders fitted again, by each of the three ways to solve for them, against NumPy's least squares."""

import numpy as np
import pytest
import torch

from sae_stability.ablation import refitting
from sae_stability.ablation.refitting import refitted

TOKENS, FEATURES, K = 3000, 120, 12


def drawn_codes() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Codes as matching pursuit gives them, and as a matrix: one feature never fires, and one twice as much as another, with it."""
    rng = np.random.default_rng(0)
    often = rng.uniform(0.001, 0.2, FEATURES)
    often[5] = 0.0
    features = torch.from_numpy(np.stack([rng.choice(FEATURES, K, p=often / often.sum()) for _ in range(TOKENS)]))
    values = torch.from_numpy((rng.random((TOKENS, K)) * (rng.random((TOKENS, K)) < 0.8)).astype(np.float32))
    with_it = features[:, 0] == 6
    features[with_it, 1], values[with_it, 1] = 7, 2 * values[with_it, 0]
    matrix = torch.zeros(TOKENS, FEATURES).scatter_add_(1, features, values).double().numpy()
    return features, values, matrix


def problem() -> tuple:
    """What `refitted` takes, and what NumPy says to it."""
    features, values, matrix = drawn_codes()
    rng = np.random.default_rng(1)
    noise = 0.5 * rng.normal(size=(TOKENS, 16)) + 3
    x = (matrix @ rng.normal(size=(FEATURES, 16)) + noise).astype(np.float32)
    judged = np.arange(TOKENS) % 2 == 1
    codes = np.hstack([matrix, np.ones((TOKENS, 1))])
    expected = codes[judged] @ np.linalg.lstsq(codes[~judged], x[~judged], rcond=None)[0]
    return (features, values, FEATURES, torch.from_numpy(x), torch.from_numpy(judged)), expected


def test_a_decoder_is_fitted_as_by_least_squares():
    given, expected = problem()
    np.testing.assert_allclose(refitted(*given), expected, atol=1e-2)


def test_a_decoder_of_many_features_is_fitted_as_well_as_one_that_is_solved_for(monkeypatch):
    given, _ = problem()
    exact = refitted(*given).numpy()
    monkeypatch.setattr(refitting, "EXACT", 100)
    iterated = refitted(*given).numpy()
    assert not np.array_equal(iterated, exact)
    np.testing.assert_allclose(iterated, exact, atol=1e-3)
    x = given[3][given[4]].numpy()
    assert np.square(x - iterated).sum() == pytest.approx(np.square(x - exact).sum(), rel=1e-5)


def test_dense_products_give_the_same_decoder(monkeypatch):
    given, _ = problem()
    monkeypatch.setattr(refitting, "ROWS", 700)  # more tokens than are dense at a time
    np.testing.assert_allclose(refitting._by_dense_products(*given), refitted(*given), atol=1e-6)


def test_with_no_feature_left_the_mean_is_what_is_fitted():
    (features, values, _, x, judged), _ = problem()
    for fit in (refitted, refitting._by_dense_products):
        predicted = fit(0 * features, 0 * values, 0, x, judged)
        np.testing.assert_allclose(predicted, x[~judged].mean(0).expand(len(predicted), -1), atol=1e-3)
