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
    features[:, 1], values[:, 1] = torch.where(features[:, 0] == 6, 7, features[:, 1]), values[:, 1]
    values[:, 1] = torch.where(features[:, 0] == 6, 2 * values[:, 0], values[:, 1])
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


@pytest.mark.parametrize("exact", [FEATURES, FEATURES - 1])  # by a Cholesky factor, and by conjugate gradients
def test_a_decoder_is_fitted_as_by_least_squares(monkeypatch, exact):
    given, expected = problem()
    monkeypatch.setattr(refitting, "EXACT", exact)
    np.testing.assert_allclose(refitted(*given), expected, atol=1e-2)
    x, judged = given[3].numpy(), given[4].numpy()
    error, least = (np.square(x[judged] - predicted).sum() for predicted in (refitted(*given).numpy(), expected))
    assert error == pytest.approx(least, rel=1e-4)


def test_dense_products_give_the_same_decoder(monkeypatch):
    given, _ = problem()
    monkeypatch.setattr(refitting, "ROWS", 700)  # more tokens than are dense at a time
    np.testing.assert_allclose(refitting._by_dense_products(*given), refitted(*given), atol=1e-6)


def test_with_no_feature_left_the_mean_is_what_is_fitted():
    (features, values, _, x, judged), _ = problem()
    for fit in (refitted, refitting._by_dense_products):
        predicted = (
            fit(features, 0 * values, 0, x, judged) if fit is refitted else fit(0 * features[:, :0], values[:, :0], 0, x, judged)
        )
        np.testing.assert_allclose(predicted, x[~judged].mean(0).expand(len(predicted), -1), atol=1e-3)
