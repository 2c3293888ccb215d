"""The interface that analyses take, and the weights behind it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import drawn, random_ensemble
from sae_stability.errors import UserError
from sae_stability.methods.dictionary import Dictionary
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import Variant
from sae_stability.study import Variants

D_IN, D_SAE, K, SCALE = 8, 30, 4, 0.4
every_variant = pytest.mark.parametrize("name", Variants.__args__)


MEAN = 2 * drawn(D_IN, seed=1)
X = MEAN + 3 * drawn(100, D_IN, seed=2)


def ensemble(name: str) -> Ensemble:
    return random_ensemble(name, D_IN, D_SAE, K, MEAN, SCALE)


@every_variant
def test_one_seed_of_an_ensemble_is_a_dictionary_on_raw_activations(name):
    trained = ensemble(name)
    for position, expected in enumerate(trained.encode(X)):
        dictionary = trained.dictionary(position)
        assert isinstance(dictionary, Dictionary)
        assert isinstance(dictionary, SAE)
        assert not dictionary.signed
        z = dictionary.codes(X).dense(D_SAE)
        torch.testing.assert_close(z, expected / SCALE, atol=1e-4, rtol=1e-4)
        assert torch.equal(dictionary.directions, trained.W_dec[position])
        assert torch.equal(dictionary.codes(X).features, next(trained.of(position).codes(trained.normalise(X)))[1].features)


@every_variant
def test_removing_features_is_zeroing_their_codes(name):
    whole = ensemble(name).dictionary(0)
    z = whole.codes(X).dense(D_SAE)
    gone, more = torch.arange(D_SAE) % 3 == 0, torch.arange(D_SAE) < 10
    removed = whole.without(gone)
    assert isinstance(removed, Dictionary)
    assert (z[:, gone] > 0).any()
    assert torch.equal(removed.codes(X).dense(D_SAE), z * ~gone)
    assert torch.equal(removed.without(more).codes(X).dense(D_SAE), z * ~(gone | more))
    assert torch.equal(whole.codes(X).dense(D_SAE), z)


@every_variant
def test_decoding_is_linear_in_codes(name):
    dictionary = ensemble(name).dictionary(1)
    a, b = drawn(5, D_SAE, seed=3), drawn(5, D_SAE, seed=4)
    constant = dictionary.decode(torch.zeros(1, D_SAE))
    torch.testing.assert_close(dictionary.decode(a), a @ dictionary.directions + constant)
    torch.testing.assert_close(dictionary.decode(2 * a - b), 2 * dictionary.decode(a) - dictionary.decode(b), atol=1e-4, rtol=1e-4)


def test_activations_of_another_width_are_refused():
    for d_in in (1, D_IN + 1):  # one column would be broadcast
        with pytest.raises(ValueError, match=f"x: d_in {d_in}, but the SAE has {D_IN}"):
            ensemble("topk").dictionary(0).codes(torch.ones(3, d_in))


@every_variant
def test_a_variants_weights_are_parameters_and_iterate_like_a_tuple(name):
    parameters = ensemble(name).saes[0]
    assert isinstance(parameters, Parameters)
    assert type(parameters) is variant(name).parameters
    again = type(parameters)(*parameters)
    assert [*again._asdict()][:4] == ["W_enc_rows", "b_enc", "W_dec", "b_dec"]
    assert all(one is other for one, other in zip(again, parameters._asdict().values(), strict=True))
    assert parameters._replace(b_dec=MEAN).b_dec is MEAN
    with pytest.raises(AttributeError):
        parameters.b_dec = MEAN


@every_variant
def test_scaling_twice_is_scaling_once(name):
    """As functions, SAE(a (b x)) with shifts in between: offsets fold in, whatever a variant calls them."""
    sae = ensemble(name).saes[0]
    twice = sae.scaled(0.5, MEAN).scaled(3.0, drawn(D_IN, seed=5))
    once = sae.scaled(1.5, MEAN / 3 + drawn(D_IN, seed=5))
    for one, other in zip(twice, once, strict=True):
        torch.testing.assert_close(one, other)


@given(tokens=st.integers(0, 9), d_sae=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_codes_of_a_dense_matrix_are_that_matrix(tokens, d_sae, seed):
    z = F.threshold(drawn(tokens, d_sae, seed=seed), -0.5, 0.0)  # negative ones too: codes may be signed
    codes = Codes.from_dense(z)
    assert torch.equal(codes.dense(d_sae), z)
    assert (codes.values != 0).all()


def test_what_saelens_does_not_have_is_said():
    class Seventh(Variant):
        encode = gradients = None

    with pytest.raises(UserError, match="format: SAELens has no architecture for Seventh"):
        Seventh(K).saelens()
