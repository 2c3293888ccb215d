import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sae_stability.config import Variants
from sae_stability.errors import UserError
from sae_stability.saes import formats, variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sae import SAE

D_IN, D_SAE, K = 12, 40, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(name: str, seeds: int = 2) -> Ensemble:
    """An ensemble with nothing left at its starting value, trained on data far from zero and one."""
    method, generator = variant(name)(K), torch.Generator().manual_seed(0)
    saes = [method.initialise(D_IN, D_SAE, generator) for _ in range(seeds)]
    stacked = (torch.stack(tensors) for tensors in zip(*saes, strict=True))
    moved = method.parameters(*(tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for tensor in stacked))
    moved = moved._replace(W_dec=F.normalize(moved.W_dec, dim=2))
    if hasattr(moved, "threshold"):
        moved = moved._replace(threshold=moved.threshold.abs() + 0.4)
    return Ensemble(name, K, list(range(seeds)), moved, mean=3 * drawn(D_IN, seed=1), scale=0.3)


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


def dictionary_learning(folder, kind: str) -> None:
    state = {"encoder.weight": drawn(D_SAE, D_IN), "encoder.bias": drawn(D_SAE), "decoder.weight": drawn(D_IN, D_SAE, seed=1)}
    state |= {"b_dec": drawn(D_IN), "k": torch.tensor(K), "threshold": torch.tensor(0.5)}
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "k": K}}))


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_folders_encode_by_its_formula(tmp_path, kind):
    dictionary_learning(tmp_path, kind)
    pre = ((X - drawn(D_IN)) @ drawn(D_SAE, D_IN).T + drawn(D_SAE)).relu()
    top = pre.topk(K, dim=1)
    expected = pre * (pre > 0.5) if kind == "BatchTopKSAE" else torch.zeros_like(pre).scatter_(1, top.indices, top.values)
    sae = formats.load(tmp_path)
    torch.testing.assert_close(sae.encode(X), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.W_dec, drawn(D_IN, D_SAE, seed=1).T)
    torch.testing.assert_close(formats.load(tmp_path / "ae.pt").encode(X), expected, atol=1e-4, rtol=1e-4)


def test_a_lone_file_holds_directions_only(tmp_path):
    for name, tensor in (("W_dec", drawn(D_SAE, D_IN)), ("decoder.weight", drawn(D_SAE, D_IN).T.contiguous())):
        save_file({name: tensor, "other": torch.ones(3)}, tmp_path / "mine.safetensors")
        sae = formats.load(tmp_path / "mine.safetensors")
        torch.testing.assert_close(sae.W_dec, drawn(D_SAE, D_IN))
        with pytest.raises(UserError, match="decoder only"):
            sae.encode(X)
        with pytest.raises(UserError, match="no encoder"):
            formats.save(sae, tmp_path / "out")


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


def broken(tmp_path, how: str):
    """A folder or file that is no SAE, for one reason."""
    state = saelens(tmp_path, "topk")
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "NaN":
        state["W_dec"][3, 2] = torch.nan
        save_file(state, weights)
    elif how == "zero":
        save_file({**state, "W_dec": torch.zeros(D_SAE, D_IN)}, weights)
    elif how == "W_enc":
        save_file({name: tensor for name, tensor in state.items() if name != "W_enc"}, weights)
    elif how == "fit each other":
        save_file({**state, "W_enc": drawn(D_IN, D_SAE + 1)}, weights)
    elif how == "missing":
        config.unlink()
    elif how == "JSON":
        config.write_text("{")
    elif how == "architecture":
        config.write_text(json.dumps({"architecture": "temporal"}))
    elif how == "normalised":
        config.write_text(json.dumps({"architecture": "topk", "k": K, "normalize_activations": "layer_norm"}))
    elif how == "no SAE":
        weights.rename(tmp_path / "model.safetensors")
    elif how == "no decoder":
        save_file({"embedding": torch.ones(3, 2)}, tmp_path / "lone.safetensors")
        return tmp_path / "lone.safetensors"
    elif how == "no such":
        return tmp_path / "nowhere"
    elif how == "other files":
        (tmp_path / "weights.bin").write_bytes(b"1")
        return tmp_path / "weights.bin"
    return tmp_path


HOWS = ["truncated", "empty", "NaN", "zero", "W_enc", "fit each other", "missing", "JSON", "architecture", "normalised"]


@pytest.mark.parametrize("how", [*HOWS, "no SAE", "no decoder", "no such", "other files"])
def test_what_is_no_sae_is_said_in_one_line(tmp_path, how):
    path = broken(tmp_path, how)
    told = {"truncated": "damaged or truncated", "empty": "damaged or truncated"}.get(how, how)
    with pytest.raises(UserError, match=told) as error:
        formats.load(path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


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
