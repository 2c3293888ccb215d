import pytest
import torch
import torch.nn.functional as F

from sae_stability.saes import Parameters, variant
from sae_stability.saes.ensemble import Ensemble

D_IN, D_SAE, K = 7, 20, 4


@pytest.fixture
def sae() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(D_SAE, D_IN, generator=generator) for _ in range(2))
    b_enc, b_dec = torch.randn(D_SAE, generator=generator) / 5, torch.randn(D_IN, generator=generator) / 5
    return Parameters(W_enc, b_enc, F.normalize(W_dec, dim=1), b_dec)


def dense_topk(sae: Parameters, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of the paper, written with dense tensors."""
    pre = (x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    return pre, F.relu(pre) * kept


def test_codes_and_reconstruction_agree_with_the_dense_formula(sae):
    x = torch.randn(50, D_IN)
    codes = variant("topk", K).encode(sae, x)
    _, z = dense_topk(sae, x, K)
    torch.testing.assert_close(codes.dense(D_SAE), z)
    torch.testing.assert_close(codes.decode(sae), z @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("dead_features", [[], [3], [0, 5, 6, 11, 19]])
def test_gradients_agree_with_autograd_on_the_dense_formula(sae, dead_features):
    x = torch.randn(40, D_IN)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[dead_features] = True
    ours = Parameters(*(torch.full_like(tensor, 7.0) for tensor in sae))  # whatever stood there is overwritten
    error, _ = variant("topk", K).gradients(sae, ours, x, dead)

    leaves = Parameters(*(tensor.clone().requires_grad_() for tensor in sae))
    pre, z = dense_topk(leaves, x, K)
    x_hat = z @ leaves.W_dec + leaves.b_dec
    loss = (x - x_hat).square().sum(1).mean()
    torch.testing.assert_close(error, loss.detach())
    if dead_features:
        among = pre[:, dead]
        k_aux = min(len(dead_features), D_IN // 2)
        kept = torch.zeros_like(among).scatter(1, among.relu().topk(k_aux, dim=1).indices, 1.0)
        explained = (among.relu() * kept) @ leaves.W_dec[dead]
        # AuxK neither moves b_dec nor the error that it explains.
        auxiliary = ((x - x_hat).detach() - explained).square().sum(1).mean() / 32
        features = [leaves.W_enc_rows, leaves.b_enc, leaves.W_dec]
        extra = torch.autograd.grad(auxiliary, features, retain_graph=True)
    loss.backward()
    expected = [leaves.W_enc_rows.grad, leaves.b_enc.grad, leaves.W_dec.grad]
    if dead_features:
        expected = [gradient + more for gradient, more in zip(expected, extra, strict=True)]
    for name, theirs in zip(("W_enc_rows", "b_enc", "W_dec"), expected, strict=True):
        torch.testing.assert_close(getattr(ours, name), theirs, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(ours.b_dec, leaves.b_dec.grad, atol=1e-4, rtol=1e-4)


def test_an_ensemble_takes_and_gives_raw_activations(sae, tmp_path):
    stacked = Parameters(*(torch.stack([tensor, tensor.flip(0)]) for tensor in sae))
    mean, scale = torch.randn(D_IN), 2.5
    ensemble = Ensemble("topk", K, [3, 8], stacked, mean, scale)
    x = torch.randn(30, D_IN) * 4 + 1
    z = ensemble.encode(x)
    assert z.shape == (2, 30, D_SAE)
    assert (z > 0).sum(2).max() <= K
    for position in range(2):
        normalised = (x - mean) * scale
        _, dense = dense_topk(stacked.of_seed(position), normalised, K)
        torch.testing.assert_close(z[position], dense)
        torch.testing.assert_close(ensemble.decode(z)[position], ensemble.reconstruct(position, x))
    assert ensemble.W_enc.shape == (2, D_IN, D_SAE)

    ensemble.save(tmp_path / "e.safetensors")
    again = Ensemble.open(tmp_path / "e.safetensors")
    assert again.seeds == [3, 8]
    assert torch.equal(again.encode(x), z)
