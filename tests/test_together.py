"""Small SAEs side by side: they are the SAEs that the training loop makes of each seed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import drawn
from sae_stability.language.activations import Activations
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.topk import TopK
from sae_stability.training import train
from sae_stability.training.loop import generator
from sae_stability.training.revival import revive
from sae_stability.training.together import _adam, _gradients, _revive, train_together

SEEDS = [3, 0, 7]
COUNT, BATCH, D_IN = 3, 50, 12


# With some dead features, and with none.
@pytest.mark.parametrize("dead_after", [200, 10**6])
def test_seeds_side_by_side_become_what_they_are_alone(cell, dead_after):
    x = drawn(2048, 12) * torch.linspace(2, 0.1, 12) + 1
    changed = {"tokens": 2048, "passes": 2, "encoder": "float32", "dead_after": dead_after, "d_sae": 40, "k": 2, "rate": 0.01}
    recipe, activations = cell.recipe.model_copy(update=changed), Activations.of(x)
    alone = train(recipe, activations, SEEDS)
    begun = [TopK(recipe.k).initialise(12, recipe.d_sae, generator(recipe, seed)) for seed in SEEDS]
    sae = Parameters(*(torch.stack(tensors) for tensors in zip(*begun, strict=True)))
    train_together(recipe, activations, SEEDS, sae)
    for ours, theirs in zip(sae, alone.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert (sae.W_dec[0] - begun[0].W_dec).abs().max() > 0.1  # it has learned


def _step(d_sae: int) -> tuple[Parameters, Tensor, Tensor]:
    """Weights of some seeds, tokens centred on their b_dec, and pre-activations."""
    drawn = torch.Generator().manual_seed(d_sae)
    directions = F.normalize(torch.randn(COUNT, d_sae, D_IN, generator=drawn), dim=2)
    biases = (0.1 * torch.randn(COUNT, size, generator=drawn) for size in (d_sae, D_IN))
    sae = Parameters(torch.randn(directions.shape, generator=drawn), next(biases), directions, next(biases))
    centred = torch.randn(COUNT, BATCH, D_IN, generator=drawn)
    return sae, centred, torch.baddbmm(sae.b_enc[:, None], centred, sae.W_enc_rows.mT)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_steps_of_adam_are_pytorch_s(scale):
    start, ours = drawn(40, 5), drawn(40, 5).numpy().reshape(-1)
    theirs = torch.nn.Parameter(start.clone())
    optimizer, moments = torch.optim.Adam([theirs], lr=1.0), [np.zeros_like(ours) for _ in range(2)]
    for step in range(1, 6):
        gradient = scale * torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"], theirs.grad = 0.1 / step, gradient
        optimizer.step()
        _adam(ours, gradient.numpy().reshape(-1), *moments, 0.1 / step, step)
    torch.testing.assert_close(torch.from_numpy(ours).view(start.shape), theirs.detach(), atol=1e-5, rtol=1e-5)


def _arrays(sae: Parameters) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in sae)


# Fewer features than a register holds, a whole number of registers, and some more; many, one and all of them active.
@pytest.mark.parametrize(("d_sae", "k"), [(5, 5), (32, 1), (32, 20), (50, 4)])
def test_gradients_are_those_of_autograd(d_sae, k):
    sae, centred, pre = _step(d_sae)
    W_enc_rows, b_enc, W_dec, b_dec = (tensor.clone().requires_grad_() for tensor in sae)
    x = centred + sae.b_dec[:, None]
    again = torch.baddbmm(b_enc[:, None], x - b_dec[:, None], W_enc_rows.mT)
    top = again.topk(k, dim=2)
    z = torch.zeros_like(again).scatter(2, top.indices, top.values.relu())
    (((torch.bmm(z, W_dec) + b_dec[:, None] - x) ** 2).sum() / BATCH).backward()
    into = Parameters(*(torch.full_like(tensor, 7.0) for tensor in sae))  # what was there before is no part of it
    error, last_fired = np.empty(x.shape, np.float32), np.zeros((COUNT, d_sae), np.int64)
    _gradients(centred.numpy(), pre.numpy(), k, 9, _arrays(sae), _arrays(into), error, last_fired)
    for ours, theirs in zip(into, (W_enc_rows, b_enc, W_dec, b_dec), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(error), torch.bmm(z, W_dec).detach() - centred, atol=1e-5, rtol=1e-4)
    assert (last_fired == 9 * (z > 0).any(1).numpy()).all()


# Fewer dead features than a token revives at a time, which is half as many as there are dimensions, more, and one seed without.
@pytest.mark.parametrize(("d_sae", "dead_share"), [(20, 0.2), (100, 0.9)])
def test_dead_features_are_revived_as_in_the_loop(d_sae, dead_share):
    sae, centred, pre = _step(d_sae)
    dead = torch.rand(COUNT, d_sae, generator=torch.Generator().manual_seed(1)) < dead_share
    dead[1] = False
    assert (dead.sum(1).max() > D_IN // 2) == (d_sae == 100)
    error = drawn(COUNT * BATCH, D_IN).view(centred.shape)
    ours, theirs = (Parameters(*(torch.full_like(tensor, 0.5) for tensor in sae)) for _ in range(2))
    _revive(centred.numpy(), pre.numpy(), error.numpy(), dead.numpy(), _arrays(sae), _arrays(ours))
    for seed in range(COUNT):
        one, into = (Parameters(*(tensor[seed] for tensor in each)) for each in (sae, theirs))
        revive(one, into, centred[seed], error[seed], dead[seed])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
