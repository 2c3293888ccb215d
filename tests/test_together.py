"""Small SAEs side by side: they are the SAEs that the training loop makes of each seed."""

import pytest
import torch

from helpers import drawn
from sae_stability.language.activations import Activations
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.topk import TopK
from sae_stability.training import train
from sae_stability.training.loop import generator
from sae_stability.training.together import train_together

SEEDS = [3, 0, 7]


# With some dead features, with more than a token revives at a time, and with none.
@pytest.mark.parametrize(("dead_after", "d_sae", "k"), [(200, 40, 2), (64, 200, 1), (10**6, 40, 2)])
def test_seeds_side_by_side_become_what_they_are_alone(cell, dead_after, d_sae, k):
    x = drawn(2048, 12) * torch.linspace(2, 0.1, 12) + 1
    changed = {"tokens": 2048, "passes": 2, "encoder": "float32", "dead_after": dead_after, "d_sae": d_sae, "k": k, "rate": 0.01}
    recipe, activations = cell.recipe.model_copy(update=changed), Activations.of(x)
    alone = train(recipe, activations, SEEDS)
    begun = [TopK(recipe.k).initialise(12, recipe.d_sae, generator(recipe, seed)) for seed in SEEDS]
    sae = Parameters(*(torch.stack(tensors) for tensors in zip(*begun, strict=True)))
    train_together(recipe, activations, SEEDS, sae)
    for ours, theirs in zip(sae, alone.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (sae.W_dec[0] - begun[0].W_dec).abs().max() > 0.1  # it has learned
