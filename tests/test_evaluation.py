"""What is said of losses, in closed form."""

import numpy as np
import pytest

from sae_stability.evaluation import Losses


def test_recovered_loss_is_the_way_from_zero_to_clean_that_the_splice_goes():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 40, 30)
    clean = tokens * rng.uniform(2, 3, 30)
    lost = tokens * rng.uniform(3, 5, 30)  # by a site of zeros
    zero = clean + lost
    nowhere, half_of_some = zero, np.where(np.arange(30) < 15, clean, zero)
    spliced = np.stack([clean + 0.2 * lost, clean, nowhere, half_of_some])
    losses = Losses(clean, zero, clean + 0.5 * lost, spliced, tokens)
    for seed, share in enumerate((0.8, 1.0, 0.0)):
        found = losses.recovered(seed)
        assert (found.value, found.low, found.high) == pytest.approx((share, share, share))  # the same of whatever documents
    mixed = losses.recovered(3)
    assert mixed.value == pytest.approx(lost[:15].sum() / lost.sum())
    assert mixed.low < mixed.value < mixed.high
    assert losses.per_token(clean).value == pytest.approx(clean.sum() / tokens.sum())
