"""The dense reference trains to the same SAE as the fast engine, and a variant that is only a loss trains with either."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import torch.nn.functional as F

from sae_stability.saes import reference, variant
from sae_stability.saes.reference import DENSE, Dense
from sae_stability.study import Variants
from sae_stability.training import loop, train

D_IN, D_SAE, K, BATCH, STEPS = 12, 24, 3, 64, 300


def batches(steps: int = STEPS) -> list[torch.Tensor]:
    """Batches of sums of a few known directions, of average norm sqrt(d_in)."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(16, D_IN, generator=generator), dim=1)
    strengths = 1 + torch.rand(steps * BATCH, 16, generator=generator)
    x = ((torch.rand(steps * BATCH, 16, generator=generator) < 0.12) * strengths) @ directions
    x -= x.mean(0)
    return list((x * (D_IN / x.square().sum(1).mean()).sqrt()).split(BATCH))


@pytest.fixture
def engine(cell, monkeypatch):
    """Trains the one seed 0 of a variant by the fast engine on given batches; nothing is revived."""
    monkeypatch.setattr(loop, "generator", lambda cell, seed: torch.Generator().manual_seed(seed))

    def run(name: str, given: list[torch.Tensor]):
        def batches_of(self, trainee, visit, places, block):
            return given[places.start : places.stop]

        monkeypatch.setattr(loop.Training, "_batches", batches_of)
        keys = {"variant": name, "coefficient": 0.3, "encoder": "float32", "dead_after": 10**9, "tokens": BATCH * len(given)}
        return train(cell.model_copy(update=keys), torch.cat(given), [0]).saes[0]

    return run


@pytest.mark.parametrize("name", Variants.__args__)
def test_the_fast_engine_and_the_reference_train_to_the_same_weights(engine, name):
    given = batches()
    begun = variant(name)(K).initialise(D_IN, D_SAE, torch.Generator().manual_seed(0))
    fast = engine(name, given)
    dense = reference.train(DENSE[name](K, 0.3), given, D_SAE, torch.Generator().manual_seed(0))
    for field, tensor in fast._asdict().items():
        torch.testing.assert_close(tensor, getattr(dense, field), atol=2e-3, rtol=2e-3, msg=lambda m, field=field: f"{field}: {m}")
    assert (fast.W_dec - begun.W_dec).abs().max() > 0.1  # it went somewhere


@pytest.mark.parametrize("name", Variants.__args__)
def test_a_dense_variant_takes_the_place_of_the_fast_one_in_training(engine, monkeypatch, name):
    given = batches(60)
    fast = engine(name, given)
    monkeypatch.setattr(loop, "variant", DENSE.__getitem__)
    for one, other in zip(fast, engine(name, given), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


SEVENTH = '''
"""SAEs with a logarithmic penalty: loss = |x - x_hat|^2 + lambda sum_i log(1 + z_i / 0.1)."""

import torch
import torch.nn.functional as F

from sae_stability.saes.reference import Dense, Forward, pre_activations, squared_error


class Logarithmic(Dense):
    def forward(self, sae, x, training):
        z = F.relu(pre_activations(sae, x))
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat) + self.coefficient * torch.log1p(z / 0.1).sum(1).mean())
'''


def test_a_seventh_variant_is_its_loss_and_trains_without_calculus(engine, tmp_path, monkeypatch):
    (tmp_path / "logarithmic.py").write_text(SEVENTH)
    spec = spec_from_file_location("sae_stability.saes.logarithmic", tmp_path / "logarithmic.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    given = batches()
    assert issubclass(variant("logarithmic"), Dense)
    method = variant("logarithmic")(K, 0.3)
    sae = reference.train(method, given, D_SAE, torch.Generator().manual_seed(0))
    for one, other in zip(sae, engine("logarithmic", given), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    x = given[0]
    codes = method.encode(sae, x)
    explained = 1 - (codes.decode(sae.W_dec) + sae.b_dec - x).square().sum() / x.square().sum()
    assert explained > 0.8
    assert len(codes.fired()) / len(x) < 6  # of 24: half of them fired at the start
