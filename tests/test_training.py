import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae_stability import training
from sae_stability.config import UserError
from sae_stability.matching import stability
from sae_stability.saes.topk import TopK
from sae_stability.training import schedule, train


def sparse_data(tokens: int = 2048, d_in: int = 12, features: int = 16, seed: int = 0) -> torch.Tensor:
    """Sums of a few known directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    fires = torch.rand(tokens, features, generator=generator) < 0.12
    return (fires * (1 + torch.rand(tokens, features, generator=generator))) @ directions


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


def test_a_seed_alone_is_the_same_seed_in_company(cell):
    x = sparse_data()
    together, reordered = train(cell, x, [0, 1, 2]), train(cell, x, [2, 0])
    assert same(together.of(1), train(cell, x, [1]))
    assert same(together.of(2), reordered.of(0))
    assert same(together.of(0), reordered.of(1))
    assert not same(together.of(0), together.of(1))


def test_initialisation_and_order_can_each_be_held_fixed(cell, monkeypatch):
    x = sparse_data()
    pinned = cell.model_copy(update={"fixed_initialisation": True, "fixed_order": True})
    both = train(pinned, x, [4, 5])
    assert same(both.of(0), both.of(1))
    for free in ("fixed_initialisation", "fixed_order"):
        ensemble = train(pinned.model_copy(update={free: False}), x, [4, 5])
        assert not same(ensemble.of(0), ensemble.of(1))


@pytest.mark.parametrize("stop_at", [1, 7, 20, 31])
def test_a_killed_run_resumes_to_the_same_bits(cell, tmp_path, monkeypatch, stop_at):
    x = sparse_data()
    undisturbed = train(cell, x, [0, 1], tmp_path / "a", checkpoint_seconds=0)

    class Killed(BaseException):
        pass

    step = training._step
    calls = iter(range(10_000))

    def dies(*arguments):
        if next(calls) == 2 * stop_at:
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(training, "_step", dies)
    with pytest.raises(Killed):
        train(cell, x, [0, 1], tmp_path / "b", checkpoint_seconds=0)
    monkeypatch.setattr(training, "_step", step)
    resumed = train(cell, x, [0, 1], tmp_path / "b", checkpoint_seconds=0)
    assert same(undisturbed, resumed)
    for name in ("curve.json", "ensemble.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    snapshots = sorted(file.name for file in (tmp_path / "a" / "snapshots").iterdir())
    for name in snapshots:
        assert (tmp_path / "a" / "snapshots" / name).read_bytes() == (tmp_path / "b" / "snapshots" / name).read_bytes()


def test_known_directions_come_back_and_gaussian_noise_does_not(cell):
    longer = cell.model_copy(update={"tokens": 20_000, "passes": 5, "d_sae": 24, "k": 3, "rate": 1e-2})
    x = sparse_data(20_000, d_in=32, features=24)
    real = stability(train(longer, x, [0, 1, 2]).W_dec, 0.9).mean().value
    spread = torch.linalg.cholesky(torch.cov(x.T) + 1e-4 * torch.eye(32))
    noise = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1)) @ spread.T
    null = stability(train(longer, noise, [0, 1, 2]).W_dec, 0.9).mean().value
    assert real > 0.8
    assert null < 0.2


def test_the_decoder_keeps_unit_rows_and_dead_features_are_revived(cell, monkeypatch):
    begin = TopK.initialise

    def handicapped(self, d_in, d_sae, generator):
        sae = begin(self, d_in, d_sae, generator)
        sae.b_enc[d_sae // 2 :] = -2.5  # half of the features lose every contest
        return sae

    monkeypatch.setattr(TopK, "initialise", handicapped)
    x = sparse_data(8192, features=32)
    wide = cell.model_copy(update={"tokens": 8192, "passes": 4, "d_sae": 32, "k": 3, "dead_after": 512})
    revived, left_alone = (train(wide.model_copy(update={"dead_after": after}), x, [0]) for after in (512, 10**9))
    torch.testing.assert_close(revived.W_dec.norm(dim=2), torch.ones(1, 32))
    fires = [int((ensemble.encode(x)[0, :, 16:] > 0).any(0).sum()) for ensemble in (revived, left_alone)]
    assert fires[0] > fires[1]


def test_each_pass_reads_every_token_once(cell):
    orders = [training._order(cell, 0, which) for which in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(cell.tokens)) for order in orders)
    assert not np.array_equal(*orders)


def test_the_rate_rises_stays_and_falls():
    rates = [schedule(step / 1000, 0.1, 0.2) for step in range(1000)]
    assert rates[0] < 0.02
    assert rates[100:800] == [1.0] * 700
    assert rates[-1] == pytest.approx(0.005)
    assert np.all(np.diff(rates[800:]) < 0)


def test_divergence_is_said_with_its_seed(cell):
    x = sparse_data()
    x[5] = torch.nan
    with pytest.raises(UserError, match="seed 0 diverged"):
        train(cell, x, [0])


def test_too_few_activations_are_said(cell):
    with pytest.raises(UserError, match="tokens"):
        train(cell, sparse_data(100), [0])
