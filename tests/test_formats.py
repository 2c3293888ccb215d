import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import drawn, random_ensemble
from sae_stability.errors import UserError
from sae_stability.saes import formats
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sae import SAE
from sae_stability.study import Variants

D_IN, D_SAE, K = 12, 40, 5


def trained(name: str, seeds: int = 2) -> Ensemble:
    return random_ensemble(name, D_IN, D_SAE, K, 3 * drawn(D_IN, seed=1), 0.3, seeds)


X = 3 * drawn(D_IN, seed=1) + 3 * drawn(200, D_IN, seed=2)  # raw activations


@pytest.mark.parametrize("name", Variants.__args__)
def test_the_normalisation_of_training_folds_into_the_weights(name):
    ensemble = trained(name)
    for position in range(2):
        sae, z = ensemble.dictionary(position), ensemble.encode(X)
        torch.testing.assert_close(sae.encode(X), z[position] / ensemble.scale, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae.decode(sae.encode(X)), ensemble.decode(z)[position], atol=1e-4, rtol=1e-4)
        assert (z[position] > 0).any()


@pytest.mark.parametrize("name", Variants.__args__)
@pytest.mark.parametrize("kind", formats.FORMATS)
def test_what_is_written_reads_as_the_same_sae(tmp_path, name, kind):
    sae = trained(name).dictionary(0)
    if kind == "sparsify" and name != "topk":
        with pytest.raises(UserError, match="sparsify has topk only"):
            formats.save(sae, tmp_path, kind)
        return
    formats.save(sae, tmp_path, kind)
    again = formats.load(tmp_path)
    torch.testing.assert_close(again.encode(X), sae.encode(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.decode(again.encode(X)), sae.decode(sae.encode(X)), atol=1e-5, rtol=1e-5)


def saelens(folder, architecture: str, **config) -> dict[str, torch.Tensor]:
    """A folder as SAELens writes it, and its weights."""
    state = {"W_enc": drawn(D_IN, D_SAE), "b_enc": drawn(D_SAE, seed=1), "W_dec": drawn(D_SAE, D_IN, seed=2), "b_dec": drawn(D_IN)}
    if architecture == "gated":
        state |= {"b_gate": state.pop("b_enc"), "r_mag": 0.1 * drawn(D_SAE, seed=4), "b_mag": drawn(D_SAE, seed=5)}
    if architecture == "jumprelu":
        state["threshold"] = drawn(D_SAE, seed=3)  # some below zero
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K, **config}))
    return state


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_saelens_folders_encode_by_saelens_s_formula(tmp_path, architecture, subtracted):
    state = saelens(tmp_path, architecture, apply_b_dec_to_input=subtracted)
    x = X - state["b_dec"] * subtracted
    if architecture == "gated":
        opened = x @ state["W_enc"] + state["b_gate"] > 0
        expected = opened * (x @ (state["W_enc"] * state["r_mag"].exp()) + state["b_mag"]).relu()
    else:
        pre = x @ state["W_enc"] + state["b_enc"]
        expected = pre.relu()
        if architecture == "jumprelu":
            expected = expected * (pre > state["threshold"])
        if architecture == "topk":
            top = expected.topk(K, dim=1)
            expected = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
    torch.testing.assert_close(formats.load(tmp_path).encode(X), expected, atol=1e-4, rtol=1e-4)


def test_saelens_topk_scaled_by_decoder_norms_chooses_and_decodes_alike(tmp_path):
    state = saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    sae = formats.load(tmp_path)
    norms = state["W_dec"].norm(dim=1)
    scaled = ((X - state["b_dec"]) @ state["W_enc"] + state["b_enc"]) * norms
    top = scaled.relu().topk(K, dim=1)
    expected = torch.zeros_like(scaled).scatter_(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(X), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.decode(expected), (expected / norms) @ state["W_dec"] + state["b_dec"], atol=1e-4, rtol=1e-4)


def dictionary_learning(folder, kind: str) -> dict[str, torch.Tensor]:
    """A folder as dictionary_learning 0.1 writes it, by the names of each of its classes, and its weights."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        state = {"W_enc": drawn(D_IN, D_SAE), "b_enc": drawn(D_SAE, seed=1), "W_dec": drawn(D_SAE, D_IN, seed=2)}
    else:
        state = {"encoder.weight": drawn(D_SAE, D_IN), "decoder.weight": drawn(D_IN, D_SAE, seed=2)}
        state |= {} if kind == "GatedAutoEncoder" else {"encoder.bias": drawn(D_SAE, seed=1)}
    b_dec = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
    state[b_dec] = drawn(D_IN, seed=3)
    if kind == "GatedAutoEncoder":
        state |= {"gate_bias": drawn(D_SAE, seed=4), "r_mag": 0.3 * drawn(D_SAE, seed=5), "mag_bias": drawn(D_SAE, seed=6)}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = drawn(D_SAE, seed=7)  # some below zero
    if "TopK" in kind:
        state |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.5)}
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "k": K}}))
    return state


@pytest.mark.parametrize("kind", formats.DICTIONARIES)
def test_dictionary_learning_folders_encode_and_decode_by_its_formula(tmp_path, kind):
    """The formulas of its `dictionary.py`, version 0.1.0, in dense tensors."""
    state = dictionary_learning(tmp_path, kind)
    linear = "encoder.weight" in state
    W_enc, W_dec = (state["encoder.weight"].T, state["decoder.weight"].T) if linear else (state["W_enc"], state["W_dec"])
    b_dec = next(state[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in state)
    if kind == "AutoEncoder":
        expected = ((X - b_dec) @ W_enc + state["encoder.bias"]).relu()
    elif kind == "AutoEncoderNew":
        expected = (X @ W_enc + state["encoder.bias"]).relu()
    elif kind == "GatedAutoEncoder":
        projected = (X - b_dec) @ W_enc
        magnitudes = (state["r_mag"].exp() * projected + state["mag_bias"]).relu()
        expected = (projected + state["gate_bias"] > 0) * magnitudes
    elif kind == "JumpReluAutoEncoder":
        pre = X @ W_enc + state["b_enc"]
        expected = (pre * (pre > state["threshold"])).relu()
    else:
        pre = ((X - b_dec) @ W_enc + state["encoder.bias" if linear else "b_enc"]).relu()
        top = pre.topk(K, dim=1)
        expected = torch.zeros_like(pre).scatter_(1, top.indices, top.values) if kind == "AutoEncoderTopK" else pre * (pre > 0.5)
    for path in (tmp_path, tmp_path / "ae.pt"):
        sae = formats.load(path)
        torch.testing.assert_close(sae.encode(X), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae.decode(expected), expected @ W_dec + b_dec, atol=1e-4, rtol=1e-4)
    assert 0 < (expected > 0).float().mean() < 1


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_training_checkpoints_of_saelens_fire_above_their_threshold(tmp_path, architecture):
    """Its k need not be whole there, and a threshold that was never measured lies below zero."""
    state = saelens(tmp_path, architecture, k=4.5)
    pre = ((X - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    for threshold in (1.5, -1.0):
        save_file({**state, "topk_threshold": torch.tensor(threshold)}, tmp_path / "sae_weights.safetensors")
        sae = formats.load(tmp_path)
        torch.testing.assert_close(sae.encode(X), pre * (pre > threshold), atol=1e-4, rtol=1e-4)
        assert sae.k == 4


def test_a_lone_file_holds_directions_only(tmp_path):
    for name, tensor in (("W_dec", drawn(D_SAE, D_IN)), ("decoder.weight", drawn(D_SAE, D_IN).T.contiguous())):
        save_file({name: tensor, "other": torch.ones(3)}, tmp_path / "mine.safetensors")
        sae = formats.load(tmp_path / "mine.safetensors")
        torch.testing.assert_close(sae.W_dec, drawn(D_SAE, D_IN))
        with pytest.raises(UserError, match="decoder only"):
            sae.encode(X)
        with pytest.raises(UserError, match="no encoder"):
            formats.save(sae, tmp_path / "out")


def test_an_sae_without_some_features_is_not_written_as_if_it_had_them(tmp_path):
    sae = trained("topk").dictionary(0).without(torch.arange(D_SAE) < 3)
    with pytest.raises(UserError, match="features were removed"):
        formats.save(sae, tmp_path)


def test_an_unknown_format_is_said(tmp_path):
    with pytest.raises(UserError, match="format: onnx"):
        formats.save(trained("topk").dictionary(0), tmp_path, "onnx")


class Executed:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_pickle_with_code_in_it_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dictionary_learning(tmp_path, "AutoEncoderTopK")
    with open("ae.pt", "wb") as file:
        pickle.dump({"encoder.weight": Executed()}, file)
    with pytest.raises(UserError, match="pickled"):
        formats.load(tmp_path)
    torch.save({"encoder.weight": Executed()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="pickled"):
        formats.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_holds_its_sae_further_down_says_where(tmp_path):
    inside = tmp_path / "layers.3"
    inside.mkdir()
    saelens(inside, "topk")
    with pytest.raises(UserError, match=r"there is one in .*layers\.3"):
        formats.load(tmp_path)


def test_half_precision_weights_are_read_in_float32(tmp_path):
    state = saelens(tmp_path, "topk")
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "sae_weights.safetensors")
    assert formats.load(tmp_path).W_dec.dtype == torch.float32
    assert load_file(tmp_path / "sae_weights.safetensors")["W_dec"].dtype == torch.float16


def test_saes_are_plain_values():
    sae = trained("topk").dictionary(0)
    assert isinstance(sae, SAE)
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((D_IN, D_SAE), (D_SAE, D_IN))
