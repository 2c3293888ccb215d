"""AuxK's gradient against autograd on its loss, written with dense tensors."""

import pytest
import torch
import torch.nn.functional as F

from sae_stability.saes import variant
from sae_stability.saes.parameters import Parameters
from sae_stability.study import Variants
from sae_stability.training.revival import revive

D_IN, D_SAE, TOKENS = 8, 30, 50


def start(seed: int) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
    """An SAE with nothing left at zero, activations, and errors of a reconstruction."""
    generator = torch.Generator().manual_seed(seed)
    sae = variant("topk")(3).initialise(D_IN, D_SAE, generator)
    sae = Parameters(*(tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for tensor in sae))
    return sae, torch.randn(TOKENS, D_IN, generator=generator), torch.randn(TOKENS, D_IN, generator=generator)


def auxiliary_loss(sae: Parameters, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """|e - e_hat|^2 / 32, a mean over tokens, e = x - x_hat is fixed and e_hat decodes the d_in / 2 strongest dead features."""
    pre = F.relu((x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc).masked_fill(~dead, 0.0)
    strongest = pre.topk(min(int(dead.sum()), D_IN // 2), dim=1)
    z = torch.zeros_like(pre).scatter(1, strongest.indices, strongest.values)
    return (-error - z @ sae.W_dec).square().sum(1).mean() / 32


@pytest.mark.parametrize("count", [1, D_IN // 2, D_IN // 2 + 1, D_SAE])
@pytest.mark.parametrize("more", [None, 0, 7])  # than there are, in the bound on dead features that replayed steps need
@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_is_that_of_the_auxiliary_loss_but_for_b_dec(count, seed, more):
    sae, x, error = start(seed)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(seed))[:count]] = True
    leaves = Parameters(*(tensor.clone().requires_grad_() for tensor in sae))
    auxiliary_loss(leaves, x, error, dead).backward()

    before = Parameters(*(torch.randn(tensor.shape) for tensor in sae))  # it is added to what stands there
    gradient = Parameters(*(tensor.clone() for tensor in before))
    revive(sae, gradient, x - sae.b_dec, error, dead, None if more is None else min(D_SAE, count + more))
    for name in ("W_enc_rows", "b_enc", "W_dec"):
        added = getattr(gradient, name) - getattr(before, name)
        torch.testing.assert_close(added, getattr(leaves, name).grad, atol=1e-5, rtol=1e-4)
        assert (added[dead] != 0).any()
        assert torch.equal(added[~dead], torch.zeros_like(added[~dead]))
    # On purpose: b_dec belongs to the live features' reconstruction, which the auxiliary loss is not to move.
    assert torch.equal(gradient.b_dec, before.b_dec)
    assert (leaves.b_dec.grad != 0).any()


@pytest.mark.parametrize("name", Variants.__args__)
def test_what_else_a_variant_has_is_left_alone(name):
    sae, x, error = start(0)
    begun = variant(name)(3).initialise(D_IN, D_SAE, torch.Generator().manual_seed(0))
    sae = type(begun)(*sae, *list(begun)[4:])
    gradient = type(sae)(*(torch.full_like(tensor, 7.0) for tensor in sae))
    revive(sae, gradient, x - sae.b_dec, error, torch.arange(D_SAE) < 5)
    for tensor in list(gradient)[3:]:
        assert (tensor == 7).all()
