"""The CUDA path: the same training with the plain kernels on a device. Skipped, and said so, where there is none."""

import pytest
import torch

from sae_stability.saes import fastest_dtype, plain, variant
from sae_stability.saes.sparse import kernels
from sae_stability.study import Variants
from sae_stability.training import train
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


def test_a_device_gets_the_plain_kernels_and_its_fastest_precision():
    assert kernels(torch.zeros(1, device="cuda")) is plain
    assert fastest_dtype(torch.device("cuda")) in (torch.bfloat16, torch.float32)


def test_a_seed_alone_is_the_same_seed_in_company_on_a_device(cell):
    x = sparse_data()
    together, alone = train(cell, x, [0, 1], device="cuda"), train(cell, x, [1], device="cuda")
    for one, other in zip(together.of(1).parameters, alone.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
