"""Our files in the libraries that they are for, and theirs here: the same input gives the same output, both ways."""

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peers import start

from sae_stability.pooling import pool
from sae_stability.saes import formats, variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.study import Variants

D_IN, D_SAE, K, BATCH = 24, 96, 8, 256
COEFFICIENTS = {"relu": 0.5, "gated": 0.5, "jumprelu": 0.5}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = 2 * drawn(D_IN, seed=1) + 3 * drawn(500, D_IN, seed=2)


def ours(name: str):
    """An SAE of ours on raw activations, with nothing left at its starting value."""
    method, generator = variant(name)(K), torch.Generator().manual_seed(0)
    begun = method.initialise(D_IN, D_SAE, generator)
    moved = type(begun)(*(tensor[None] + 0.2 * torch.randn(tensor.shape, generator=generator) for tensor in begun))
    moved = moved._replace(W_dec=F.normalize(moved.W_dec, dim=2))
    if hasattr(moved, "threshold"):
        moved = moved._replace(threshold=moved.threshold.abs() + 0.5)
    return Ensemble(name, K, [0], moved, 2 * drawn(D_IN, seed=1), 0.3).dictionary(0)


def sparsify():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    import sparsify

    return sparsify


@pytest.mark.parametrize("name", Variants.__args__)
def test_saelens_loads_ours(tmp_path, name):
    from sae_lens import SAE

    sae = ours(name)
    formats.save(sae, tmp_path, "saelens")
    theirs = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(X), sae.encode(X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(X), sae.decode(sae.encode(X)), atol=1e-5, rtol=1e-5)


def test_sparsify_loads_ours(tmp_path):
    sae = ours("topk")
    formats.save(sae, tmp_path, "sparsify")
    theirs = sparsify().SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        values, features, _ = theirs.encode(X)
        codes = torch.zeros(len(X), D_SAE).scatter_(1, features, values)
        torch.testing.assert_close(codes, sae.encode(X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.decode(values, features), sae.decode(sae.encode(X)), atol=1e-5, rtol=1e-5)


def trained(library: str, name: str):
    """A peer's trainee after some steps of its own trainer."""
    size = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "batch": BATCH, "steps": 60, "rate": 1e-3}
    trainee = start(library, name, **size, mode="float32", coefficient=COEFFICIENTS.get(name), seed=0)
    for step in range(60):
        trainee.step(X.mean(0) + 3 * drawn(BATCH, D_IN, seed=step))
    return trainee


@pytest.mark.parametrize("name", Variants.__args__)
def test_what_saelens_trained_and_saved_loads(tmp_path, name):
    trainee = trained("saelens", name)
    trainee.trainer.sae.save_inference_model(tmp_path)
    sae = formats.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(X), trainee.encode(X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(sae.encode(X)), trainee.reconstruct(X), atol=1e-5, rtol=1e-5)


def test_what_sparsify_trained_and_saved_loads(tmp_path):
    trainee = trained("sparsify", "topk")
    trainee.coder.save_to_disk(tmp_path)
    sae = formats.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(X), trainee.encode(X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(sae.encode(X)), trainee.reconstruct(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", Variants.__args__)
def test_what_dictionary_learning_trained_and_saved_loads(tmp_path, name):
    trainer = trained("dictionary_learning", name).trainer
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))
    sae = formats.load(tmp_path)
    with torch.no_grad():
        codes = trainer.ae.encode(X)
        torch.testing.assert_close(sae.encode(X), codes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae.decode(sae.encode(X)), trainer.ae.decode(codes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", Variants.__args__)
def test_a_pool_loads_in_saelens_with_what_it_stands_for(tmp_path, name):
    from sae_lens import SAE

    pooled = pool([shaken(name, seed) for seed in range(3)], X)
    formats.save(pooled.sae, tmp_path, "saelens", pooled.stars.metadata())
    theirs = SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata["stability"] == pooled.stars.stability.tolist()
    assert len(theirs.cfg.metadata["members"]) == len(pooled.stars)
    with torch.no_grad():
        torch.testing.assert_close(theirs(X), pooled.sae.decode(pooled.sae.encode(X)), atol=1e-5, rtol=1e-5)


def test_a_pool_loads_in_sparsify(tmp_path):
    pooled = pool([shaken("topk", seed) for seed in range(3)], X)
    formats.save(pooled.sae, tmp_path, "sparsify", pooled.stars.metadata())
    theirs = sparsify().SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        values, features, _ = theirs.encode(X)
        torch.testing.assert_close(theirs.decode(values, features), pooled.sae.decode(pooled.sae.encode(X)), atol=1e-5, rtol=1e-5)


def shaken(name: str, seed: int):
    """An SAE of ours, with noise on its weights: one of several that are alike."""
    sae, generator = ours(name), torch.Generator().manual_seed(seed)
    noisy = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in sae.parameters._asdict().items()
    }
    return replace(sae, parameters=type(sae.parameters)(**noisy))
