"""What null sources keep of the activations and what they leave out."""

import threading

import numpy as np
import pytest
import torch

from sae_stability import threads
from sae_stability.language.activations import Activations
from sae_stability.sources import Site, Source, Surrogate, TokenConditional, Whitened, source, write_drawn
from sae_stability.study import Nulls

TOKENS, VOCABULARY, D_IN = 40_000, 30, 5


def planted(seed: int = 0) -> tuple[Activations, torch.Tensor]:
    """Skewed activations around a mean of each token's own; tokens differ in how often they occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(TOKENS, generator=generator) ** 3 * VOCABULARY).long()
    means = 3 * torch.randn(VOCABULARY, D_IN, generator=generator)
    mixing = torch.randn(D_IN, D_IN, generator=generator)
    x = means[ids] + (torch.rand(TOKENS, D_IN, generator=generator) ** 4) @ mixing + 10
    return Activations.of(x), ids


def drawn(kind: type[Source], real: Activations, ids: torch.Tensor, path) -> Activations:
    write_drawn(kind.fit(real, ids), real, ids, path, 0, kind.kind)
    return Activations.open(path)


def excess(x: torch.Tensor) -> float:
    """The largest departure of a coordinate's third and fourth moments from a Gaussian's."""
    standardised = (x - x.mean(0)) / x.std(0)
    return max(standardised.pow(3).mean(0).abs().max().item(), standardised.pow(4).mean(0).sub(3).abs().max().item() / 3)


def test_the_surrogate_has_mean_and_covariance_and_nothing_else(tmp_path):
    real, ids = planted()
    surrogate = drawn(Surrogate, real, ids, tmp_path / "s.bin")
    assert len(surrogate) == len(real)
    torch.testing.assert_close(surrogate.mean, real.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(surrogate.covariance, real.covariance, atol=0.3, rtol=0.05)
    assert excess(real.data) > 0.2
    assert excess(surrogate.data) < 0.1
    drawn(Surrogate, real, ids, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "s.bin").read_bytes()


def test_whitened_activations_are_the_activations_with_the_identity_as_covariance(tmp_path):
    real, ids = planted()
    whitened = drawn(Whitened, real, ids, tmp_path / "w.bin")
    torch.testing.assert_close(whitened.covariance, torch.eye(D_IN), atol=1e-3, rtol=0)
    assert whitened.mean.abs().max() < 1e-4
    assert whitened.scale == pytest.approx(1, abs=1e-3)
    # Nothing is lost: a linear map gives them back.
    back = np.linalg.lstsq(whitened.data.double().numpy(), (real.data - real.mean).double().numpy(), rcond=None)
    assert back[1].max() / len(real) < 1e-6


def test_a_token_conditional_surrogate_keeps_each_token_s_mean_and_the_covariance_and_no_more(tmp_path):
    real, ids = planted()
    conditional = drawn(TokenConditional, real, ids, tmp_path / "t.bin")
    torch.testing.assert_close(conditional.covariance, real.covariance, atol=0.3, rtol=0.05)
    for token in torch.bincount(ids).topk(8).indices:
        torch.testing.assert_close(conditional.data[ids == token].mean(0), real.data[ids == token].mean(0), atol=0.15, rtol=0)
    within = [data.clone() for data in (real.data, conditional.data)]
    for data in within:
        for token in range(VOCABULARY):
            data[ids == token] -= data[ids == token].mean(0)
    torch.testing.assert_close(torch.cov(within[1].T), torch.cov(within[0].T), atol=0.05, rtol=0.1)
    assert excess(within[0]) > 0.3
    assert excess(within[1]) < 0.1


def test_tokens_that_are_rare_or_not_in_the_text_share_a_mean():
    real, ids = planted()
    draw = TokenConditional.fit(real, torch.where(torch.arange(TOKENS) < 5, VOCABULARY + 7, ids))
    rare, unknown = (torch.full((20_000,), token) for token in (VOCABULARY + 7, VOCABULARY + 50))
    means = [draw(torch.zeros(len(each), D_IN), each, torch.Generator().manual_seed(1)).mean(0) for each in (rare, unknown)]
    torch.testing.assert_close(*means, atol=1e-5, rtol=0)


def test_every_null_of_a_study_is_a_class_and_only_those_drawn_can_be_fitted():
    assert {source(kind).kind for kind in Nulls.__args__} == set(Nulls.__args__)
    assert source("real") is Site
    with pytest.raises(TypeError):
        Site.fit(*planted())


def test_items_are_made_ahead_in_their_order_and_what_fails_is_raised():
    made = []

    def items():
        for number in range(4):
            made.append((number, threading.get_ident()))
            yield number
        raise ValueError("no more")

    taken = []
    with pytest.raises(ValueError, match="no more"):
        for number in threads.ahead(items()):
            taken.append(number)
    assert taken == [0, 1, 2, 3]
    assert [number for number, _ in made] == [0, 1, 2, 3]
    assert threading.get_ident() not in {thread for _, thread in made}
