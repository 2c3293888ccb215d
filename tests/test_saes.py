"""Each variant against its paper's formula, written with dense tensors and differentiated by autograd in `reference.py`."""

import pytest
import torch
import torch.nn.functional as F

from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.reference import DENSE
from sae_stability.study import Variants

D_IN, D_SAE, K, LAMBDA = 7, 40, 4, 0.3
NAMES = Variants.__args__
every_variant = pytest.mark.parametrize("name", NAMES)


def random_sae(name: str, seed: int = 0):
    """Parameters of a variant with nothing left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    sae = variant(name)(K).initialise(D_IN, D_SAE, generator)
    moved = [tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for tensor in sae]
    sae = type(sae)(*moved)
    if variant(name).unit_decoder:
        sae = sae._replace(W_dec=F.normalize(sae.W_dec, dim=1))
    return sae._replace(threshold=sae.threshold.abs()) if hasattr(sae, "threshold") else sae


@every_variant
def test_codes_and_reconstruction_agree_with_the_papers_formula(name):
    sae, x = random_sae(name), torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    codes = variant(name)(K).encode(sae, x)
    z, x_hat, _ = DENSE[name](K, LAMBDA).forward(sae, x, training=False)
    torch.testing.assert_close(codes.dense(D_SAE), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codes.decode(sae.W_dec) + sae.b_dec, x_hat, atol=1e-5, rtol=1e-5)
    assert 0 < len(codes.fired()) < 50 * D_SAE


@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_autograd_on_the_papers_formula(name, seed):
    sae, x = random_sae(name, seed), torch.randn(300, D_IN, generator=torch.Generator().manual_seed(seed + 9))
    if seed == 2:
        sae = sae._replace(b_enc=sae.b_enc - 2)  # fewer than k are positive
    ours = type(sae)(*(torch.full_like(tensor, 7.0) for tensor in sae))  # whatever stood there is overwritten
    error, codes = variant(name)(K, LAMBDA).gradients(sae, ours, x)

    expected = type(sae)(*(torch.full_like(tensor, 9.0) for tensor in sae))
    dense_error, dense_codes = DENSE[name](K, LAMBDA).gradients(sae, expected, x)
    torch.testing.assert_close(error, dense_error, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codes.dense(D_SAE), dense_codes.dense(D_SAE), atol=1e-4, rtol=1e-4)
    for field, gradient in ours._asdict().items():
        slope = getattr(expected, field)
        torch.testing.assert_close(gradient, slope, atol=1e-4, rtol=1e-4, msg=lambda m, field=field: f"{field}: {m}")


@every_variant
def test_features_in_another_order_give_the_same_sae(name):
    sae, x = random_sae(name), torch.randn(80, D_IN)
    order = torch.randperm(D_SAE)
    permuted = type(sae)(*(tensor[order] if len(tensor.shape) and len(tensor) == D_SAE else tensor for tensor in sae))
    z, moved = (variant(name)(K).encode(weights, x).dense(D_SAE) for weights in (sae, permuted))
    torch.testing.assert_close(moved, z[:, order])


@every_variant
def test_looking_for_firings_in_bfloat16_hardly_moves_the_gradient(name):
    sae, x = random_sae(name), torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(4))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient = type(sae)(*(torch.zeros_like(tensor) for tensor in sae))
        variant(name)(K, LAMBDA, dtype).gradients(sae, gradient, x)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    exact, fast = gradients
    assert (fast - exact).norm() < 0.05 * exact.norm()
    if name == "topk":  # a batch's largest are chosen among candidates in float32
        assert not torch.equal(fast, exact)


def test_finishing_a_relu_sae_leaves_what_it_computes():
    sae, x = random_sae("relu"), torch.randn(30, D_IN)
    method = variant("relu")(K)
    before = method.encode(sae, x).decode(sae.W_dec)
    method.finish(sae, iter(()))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(method.encode(sae, x).decode(sae.W_dec), before)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_the_threshold_is_the_mean_of_the_smallest_that_fired(name):
    sae, batches = random_sae(name), [torch.randn(64, D_IN, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    variant(name)(K).finish(sae, iter(batches))
    smallest = [((x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc).flatten().topk(K * 64).values[-1] for x in batches]
    torch.testing.assert_close(sae.threshold, torch.stack(smallest).mean())
    fired = [len(variant(name)(K).encode(sae, x).fired()) / 64 for x in batches]
    assert sum(fired) / 3 == pytest.approx(K, rel=0.1)


def test_a_variant_is_its_file():
    assert [variant(name).__name__.lower() for name in NAMES] == list(NAMES)


@every_variant
def test_an_ensemble_takes_and_gives_raw_activations(name, tmp_path):
    two = [random_sae(name, seed) for seed in range(2)]
    stacked = type(two[0])(*(torch.stack(tensors) for tensors in zip(*two, strict=True)))
    mean, scale = torch.randn(D_IN), 2.5
    ensemble = Ensemble(name, K, [3, 8], stacked, mean, scale)
    x = torch.randn(30, D_IN) * 4 + 1
    z = ensemble.encode(x)
    assert z.shape == (2, 30, D_SAE)
    for position in range(2):
        expected = DENSE[name](K).forward(two[position], (x - mean) * scale, training=False).z
        torch.testing.assert_close(z[position], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ensemble.decode(z)[position], ensemble.reconstruct(position, x), atol=1e-4, rtol=1e-4)
    assert ensemble.W_enc.shape == (2, D_IN, D_SAE)

    ensemble.save(tmp_path / "e.safetensors")
    again = Ensemble.open(tmp_path / "e.safetensors")
    assert again.seeds == [3, 8]
    assert torch.equal(again.encode(x), z)
    assert torch.equal(Ensemble.joined([ensemble.of(0), ensemble.of(1)]).encode(x), z)
