"""Matching pursuit against a plain loop, and on what it must recover."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import drawn
from sae_stability.methods.pursuit import matching_pursuit


def codes_of(x: torch.Tensor, directions: torch.Tensor, k: int) -> np.ndarray:
    """The codes [token, d_sae] that matching pursuit finds."""
    ((features, values),) = matching_pursuit(x, directions, k, torch.zeros(1, len(directions), dtype=torch.bool))
    return torch.zeros(len(x), len(directions)).scatter_add_(1, features, values).numpy() if len(directions) else values.numpy()


def by_hand(x: np.ndarray, directions: np.ndarray, k: int) -> np.ndarray:
    """One token after another in float64, with the residual itself."""
    codes = np.zeros((len(x), len(directions)))
    for token, residual in enumerate(x.astype(np.float64)):
        for _ in range(k):
            along = directions @ residual
            if along.max() <= 0:
                break
            codes[token, along.argmax()] += along.max()
            residual = residual - along.max() * directions[along.argmax()]
    return codes


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 6))
def test_it_is_that_of_a_plain_loop(seed, count, k):
    x, directions = drawn(7, 5, seed=seed), F.normalize(drawn(count, 5, seed=seed + 1), dim=1)
    np.testing.assert_allclose(codes_of(x, directions, k), by_hand(x.numpy(), directions.double().numpy(), k), atol=1e-4)


def test_orthogonal_features_are_told_exactly_and_in_any_order():
    directions = torch.linalg.qr(drawn(32, 32))[0]
    strengths = drawn(100, 32, seed=1).relu() * (drawn(100, 32, seed=2) > 1.2)
    k = int((strengths > 0).sum(1).max())
    found = codes_of(strengths @ directions, directions, k)
    np.testing.assert_allclose(found, strengths, atol=1e-5)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(codes_of(strengths @ directions, directions[order], k), found[:, order], atol=1e-5)


def test_more_tokens_than_are_encoded_at_a_time_change_nothing(monkeypatch):
    x, directions = drawn(50, 8), F.normalize(drawn(20, 8, seed=1), dim=1)
    together = codes_of(x, directions, 4)
    monkeypatch.setattr("sae_stability.methods.pursuit.ROWS", 7)
    np.testing.assert_allclose(codes_of(x, directions, 4), together, atol=1e-6)


def test_nothing_is_taken_where_every_direction_points_away_or_none_is_left():
    away = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert not codes_of(-torch.ones(3, 2), away, 2).any()
    for none in (away[:0], away):
        ((features, values),) = matching_pursuit(torch.ones(3, 2), none, 2, torch.ones(1, len(none), dtype=torch.bool))
        assert features.shape == values.shape == (3, 2)
        assert not values.any()


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 6))
def test_without_a_set_the_others_are_pursued_as_if_they_were_alone(seed, count, k):
    x, directions = drawn(7, 5, seed=seed), F.normalize(drawn(count, 5, seed=seed + 1), dim=1)
    without = torch.stack(
        [drawn(count, seed=seed + 2) > 0.5, torch.zeros(count, dtype=torch.bool), drawn(count, seed=seed + 3) > -1]
    )
    for (features, values), gone in zip(matching_pursuit(x, directions, k, without), without, strict=True):
        left = directions[~gone]
        found = torch.zeros(len(x), max(len(left), 1)).scatter_add_(1, features, values)[:, : len(left)]
        np.testing.assert_allclose(found, by_hand(x.numpy(), left.double().numpy(), k) if len(left) else found, atol=1e-4)
        assert len(left) or not values.any()
