"""The CUDA path: kernels and training on a device against the CPU. Skipped, and said so, where there is none."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from tqdm import tqdm

from sae_stability.ablation.refitting import refitted
from sae_stability.language.activations import Activations
from sae_stability.saes import fastest_dtype, sparse, variant
from sae_stability.study import Variants
from sae_stability.training import train
from sae_stability.training.finetuning import finetune
from sae_stability.training.loop import STRETCH, Training
from test_kernels import DTYPES, check_products, check_pursuit, check_top, shapes
from test_refitting import problem
from test_training import sparse_data

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine: the CUDA path is not tested here"
)


@pytest.mark.parametrize("name", Variants.__args__)
def test_training_on_a_device_follows_training_on_the_cpu(cell, name):
    x = sparse_data()
    few = cell.model_copy(update={"variant": name, "coefficient": 1.0, "tokens": 640, "encoder": "float32"})
    here, there = (train(few, x, [0, 1], device=device) for device in ("cpu", "cuda"))
    for one, other in zip(here.parameters, there.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", Variants.__args__)
def test_gradients_on_a_device_are_those_of_the_cpu(name):
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    sae = variant(name)(4).initialise(16, 64, torch.Generator().manual_seed(1))
    gradients = []
    for device in ("cpu", "cuda"):
        there = type(sae)(*(tensor.to(device) for tensor in sae))
        gradient = type(sae)(*(torch.zeros_like(tensor) for tensor in there))
        variant(name)(4, 0.5).gradients(there, gradient, x.to(device))
        gradients.append([part.cpu() for part in gradient])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def kernels():
    return sparse.kernels(torch.zeros(1, device="cuda"))


def test_a_device_gets_the_triton_kernels_and_its_fastest_precision():
    pytest.importorskip("triton")
    assert kernels().__name__ == "sae_stability.saes.cuda"
    assert fastest_dtype(torch.device("cuda")) in (torch.bfloat16, torch.float32)


@DTYPES
@given(shape=shapes)
@settings(max_examples=60)
def test_a_device_finds_the_k_largest(shape, dtype):
    check_top(kernels(), *shape, dtype, "cuda")


@pytest.mark.parametrize(("d_sae", "k"), [(24_576, 32), (65_536, 200), (70_000, 8)])  # the last is too wide for a program
def test_a_device_finds_the_k_largest_of_many(d_sae, k):
    check_top(kernels(), 50, d_sae, k, 0, torch.bfloat16, "cuda")


def test_a_device_fills_up_where_too_few_are_positive():
    pre = -torch.ones(3, 600, device="cuda")
    pre[1, 7] = 2.0
    features = kernels().top(pre, 4)
    assert all(len(set(row)) == 4 for row in features.tolist())
    assert 7 in features[1]


@given(shape=shapes)
@settings(max_examples=60)
def test_a_device_pursues_as_the_cpu_does(shape):
    check_pursuit(kernels(), *shape, "cuda")


def test_a_device_pursues_over_many_directions():
    check_pursuit(kernels(), 50, 20_000, 8, 0, "cuda")


def test_a_device_fits_the_decoder_that_the_cpu_fits():
    (features, values, *rest), _ = problem()
    torch.testing.assert_close(
        refitted(features.cuda(), values.cuda(), *rest), refitted(features, values, *rest), atol=1e-6, rtol=0
    )


@given(shape=shapes)
@settings(max_examples=60)
def test_sparse_products_on_a_device_are_dense_products(shape):
    check_products(kernels(), *shape, "cuda")


@pytest.mark.parametrize("shape", [(4096, 8, 300, 0), (3, 40, 768, 1)])  # features that fire on most tokens; several blocks wide
def test_sparse_products_of_any_size_on_a_device(shape):
    check_products(kernels(), *shape, "cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_of_topk_are_replayed_and_do_not_wait_for_the_device(cell):
    x = Activations.of(sparse_data()).to(torch.device("cuda"))
    recipe = cell.model_copy(update={"variant": "topk", "dead_after": 10**9})
    training = Training(recipe, [0], [0.0], [STRETCH] * 4, x.d_in, None, torch.device("cuda"), math.inf, tqdm(disable=True))
    training.consume(0, x)  # the first steps compile kernels
    training.consume(1, x)  # the next are recorded
    (trainee,) = training.trainees
    assert trainee.recorded[0] is not None
    with no_waiting():
        training._advance(trainee, 0, range(2 * STRETCH, 3 * STRETCH), 2, 2 * STRETCH, x)


@pytest.mark.parametrize("dead_after", [100, 10**9])
def test_replayed_steps_give_the_bits_of_steps_that_are_launched(cell, monkeypatch, dead_after):
    recipe = cell.model_copy(update={"variant": "topk", "dead_after": dead_after, "tokens": 2048, "passes": 4})
    replayed = train(recipe, sparse_data(), [0, 1], device="cuda")
    monkeypatch.setattr(variant("topk"), "steady", False)
    launched = train(recipe, sparse_data(), [0, 1], device="cuda")
    assert all(torch.equal(one, other) for one, other in zip(replayed.parameters, launched.parameters, strict=True))


def test_dead_features_are_revived_on_a_device_as_on_the_cpu(cell):
    recipe = cell.model_copy(update={"variant": "topk", "d_sae": 200, "dead_after": 128, "tokens": 640, "encoder": "float32"})
    here, there = (train(recipe, sparse_data(), [0], device=device) for device in ("cpu", "cuda"))
    never = train(recipe.model_copy(update={"dead_after": 10**9}), sparse_data(), [0])
    torch.testing.assert_close(here.W_dec, there.W_dec, atol=2e-3, rtol=2e-3)
    assert (here.W_dec - never.W_dec).abs().max() > 0.01  # some died


@pytest.mark.parametrize("decoder_alone", [False, True])
@pytest.mark.parametrize("name", ["topk", "relu"])
def test_fine_tuning_on_a_device_follows_that_on_the_cpu(cell, name, decoder_alone):
    recipe = cell.model_copy(update={"variant": name, "coefficient": 1.0, "tokens": 640, "encoder": "float32"}).recipe
    x = Activations.of(sparse_data())
    start = train(recipe, x, [0])
    here, there = (finetune(start, recipe, x, device, decoder_alone) for device in ("cpu", "cuda"))
    for one, other in zip(here.parameters, there.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_a_unit_step_is_adam_on_the_sphere():
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(300, 70, generator=generator), dim=1).cuda()
    ours, theirs = W.clone(), W.clone()
    moments, adam = (torch.zeros_like(W), torch.zeros_like(W)), torch.optim.Adam([theirs], lr=0.01)
    for step in range(1, 20):
        its = torch.randn(300, 70, generator=generator).cuda()
        kernels().unit_step(ours, its, moments, torch.tensor(0.01).cuda(), torch.tensor(float(step)).cuda(), (0.9, 0.999), 1e-8)
        theirs.grad = its - (its * theirs).sum(1, keepdim=True) * theirs
        adam.step()
        theirs.copy_(torch.nn.functional.normalize(theirs, dim=1))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", Variants.__args__)
def test_training_twice_on_a_device_gives_the_same_bits(cell, name):
    few = cell.model_copy(update={"variant": name, "coefficient": 1.0, "tokens": 2048})
    once, again = (train(few, sparse_data(), [0, 1], device="cuda") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once.parameters, again.parameters, strict=True))


def test_a_seed_alone_is_the_same_seed_in_company_on_a_device(cell):
    x = sparse_data()
    together, alone = train(cell, x, [0, 1], device="cuda"), train(cell, x, [1], device="cuda")
    for one, other in zip(together.of(1).parameters, alone.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
