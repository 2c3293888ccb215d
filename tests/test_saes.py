"""Each variant against its paper's formula, written with dense tensors and differentiated by autograd."""

import pytest
import torch
import torch.nn.functional as F

from sae_stability.config import Variants
from sae_stability.saes import files_of, variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.jumprelu import BANDWIDTH
from sae_stability.saes.matryoshka import sizes

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


def keep_largest(pre: torch.Tensor, count: int) -> torch.Tensor:
    flat = pre.detach().flatten()
    return torch.zeros_like(flat).scatter(0, flat.topk(count).indices, 1.0).view_as(pre)


class Step(torch.autograd.Function):
    """The step function, with the straight-through gradient of JumpReLU's paper for its threshold (eq. 11 and 12)."""

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, upstream):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return None, -(upstream * window).sum(0)


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, upstream):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return upstream * (pre > threshold), -(upstream * threshold * window).sum(0)


def dense(name: str, sae, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, reconstruction and loss as the papers write them."""
    projected = (x - sae.b_dec) @ sae.W_enc_rows.T
    pre = projected + sae.b_enc
    penalty = torch.zeros(())
    if name == "topk":
        z = F.relu(pre) * torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1.0)
    elif name in ("batchtopk", "matryoshka"):
        kept = keep_largest(pre, K * len(x)) if training else (pre > sae.threshold).float()
        z = F.relu(pre) * kept
    elif name == "relu":
        z = F.relu(pre)
        penalty = LAMBDA * (z * sae.W_dec.norm(dim=1)).sum(1).mean()
    elif name == "gated":
        z = (pre > 0) * F.relu(sae.r_mag.exp() * projected + sae.b_mag)
        frozen = F.relu(pre) @ sae.W_dec.detach() + sae.b_dec.detach()
        penalty = LAMBDA * F.relu(pre).sum(1).mean() + (x - frozen).square().sum(1).mean()
    else:
        threshold = sae.log_threshold.exp()
        z = JumpReLU.apply(pre, threshold)
        penalty = LAMBDA * Step.apply(pre, threshold).sum(1).mean()
    x_hat = z @ sae.W_dec + sae.b_dec
    loss = (x - x_hat).square().sum(1).mean()
    if name == "matryoshka":
        nested = [z[:, :size] @ sae.W_dec[:size] + sae.b_dec for size in sizes(D_SAE)]
        loss = sum((x - part).square().sum(1).mean() for part in nested)
    return z, x_hat, loss + penalty


@every_variant
def test_codes_and_reconstruction_agree_with_the_papers_formula(name):
    sae, x = random_sae(name), torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    codes = variant(name)(K).encode(sae, x)
    z, x_hat, _ = dense(name, sae, x, training=False)
    torch.testing.assert_close(codes.dense(D_SAE), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codes.decode(sae.W_dec) + sae.b_dec, x_hat, atol=1e-5, rtol=1e-5)
    assert 0 < len(codes.fired()) < 50 * D_SAE


@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_autograd_on_the_papers_formula(name, seed):
    sae, x = random_sae(name, seed), torch.randn(300, D_IN, generator=torch.Generator().manual_seed(seed + 9))
    ours = type(sae)(*(torch.full_like(tensor, 7.0) for tensor in sae))  # whatever stood there is overwritten
    error, codes = variant(name)(K, LAMBDA).gradients(sae, ours, x)

    leaves = type(sae)(*(tensor.clone().requires_grad_() for tensor in sae))
    z, x_hat, loss = dense(name, leaves, x, training=True)
    loss.backward()
    torch.testing.assert_close(error, (x_hat - x).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codes.dense(D_SAE), z.detach(), atol=1e-4, rtol=1e-4)
    for field, gradient, leaf in zip(sae._asdict(), ours, leaves, strict=True):
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4, msg=lambda m, field=field: f"{field}: {m}")


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
    assert files_of("matryoshka") == ["saes/batchtopk.py", "saes/matryoshka.py", "saes/variant.py"]
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
        expected, _, _ = dense(name, two[position], (x - mean) * scale, training=False)
        torch.testing.assert_close(z[position], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ensemble.decode(z)[position], ensemble.reconstruct(position, x), atol=1e-4, rtol=1e-4)
    assert ensemble.W_enc.shape == (2, D_IN, D_SAE)

    ensemble.save(tmp_path / "e.safetensors")
    again = Ensemble.open(tmp_path / "e.safetensors")
    assert again.seeds == [3, 8]
    assert torch.equal(again.encode(x), z)
    assert torch.equal(Ensemble.joined([ensemble.of(0), ensemble.of(1)]).encode(x), z)
