import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import drawn, random_ensemble
from sae_stability.errors import UserError
from sae_stability.saes import formats
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.libraries import dictionary_learning as files
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


@pytest.mark.parametrize("kind", files.DICTIONARIES)
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


# What the field has written


def written(folder, state: dict, config: dict | None, weights="sae_weights.safetensors", configuration="cfg.json"):
    """A folder with some weights and a configuration."""
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    if weights.endswith(".npz"):
        np.savez(folder / weights, **{name: tensor.numpy() for name, tensor in state.items()})
    elif weights.endswith(".pt"):
        torch.save(state, folder / weights)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / weights)
    if config is not None:
        (folder / configuration).write_text(json.dumps(config))
    return folder


def standard() -> dict[str, torch.Tensor]:
    return {"W_enc": drawn(D_IN, D_SAE), "b_enc": drawn(D_SAE, seed=1), "W_dec": drawn(D_SAE, D_IN, seed=2), "b_dec": drawn(D_IN)}


def pre(state, x=X):
    return (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]


@pytest.mark.parametrize("fields", [{"activation_fn_str": "topk"}, {"activation_fn": "topk"}])
@pytest.mark.parametrize("architecture", [{}, {"architecture": "standard"}, {"architecture": "topk"}])
def test_topk_of_older_saelens_stands_in_its_activation_function(tmp_path, architecture, fields):
    state = standard()
    folder = written(tmp_path, state, {"activation_fn_kwargs": {"k": K}} | architecture | fields)
    sae = formats.load(folder)
    assert (sae.variant, sae.k) == ("topk", K)
    assert ((sae.encode(X) > 0).sum(1) <= K).all()
    top = pre(state).relu().topk(K, dim=1)
    expected = torch.zeros(len(X), D_SAE).scatter_(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(X), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_saelens_files_of_before_there_was_an_architecture_are_known_by_their_tensors(tmp_path, kind):
    state = standard()
    if kind == "gated":
        state |= {"b_gate": state.pop("b_enc"), "r_mag": drawn(D_SAE, seed=4), "b_mag": drawn(D_SAE, seed=5)}
    if kind == "jumprelu":
        state["threshold"] = drawn(D_SAE, seed=3).abs()
    assert formats.load(written(tmp_path, state, {"activation_fn": "relu", "normalize_activations": False})).variant == kind


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        ("finetuning_scaling_factor", {"finetuning_scaling_factor": True}),
        ("scaling_factor", {"finetuning_scaling_factor": True}),
        ("scaling_factor", {}),
    ],
)
def test_a_scaling_factor_of_fine_tuning_scales_what_is_decoded(tmp_path, tensor, told):
    scale = drawn(D_SAE, seed=6).abs()
    state = standard() | {tensor: scale}
    sae = formats.load(written(tmp_path, state, {"architecture": "standard", **told}))
    z = pre(state).relu()
    torch.testing.assert_close(sae.encode(X), z, atol=1e-4, rtol=1e-4)
    expected = (z * scale) @ state["W_dec"] + state["b_dec"]
    torch.testing.assert_close(sae.decode(sae.encode(X)), expected, atol=1e-3, rtol=1e-4)


def test_a_scaling_factor_that_the_file_denies_is_refused_unless_it_does_nothing(tmp_path):
    denied = {"architecture": "standard", "finetuning_scaling_factor": False}
    plain, ones = standard(), standard() | {"scaling_factor": torch.ones(D_SAE)}
    found = [
        formats.load(written(tmp_path / name, state, denied)).decode(X[:, :1] * 0 + torch.ones(1, D_SAE))
        for name, state in (("plain", plain), ("ones", ones))
    ]
    assert torch.equal(*found)
    with pytest.raises(UserError, match="finetuning_scaling_factor is false, and the weights hold a scaling_factor"):
        formats.load(written(tmp_path / "denied", standard() | {"scaling_factor": 2 * torch.ones(D_SAE)}, denied))
    with pytest.raises(UserError, match="no tensor finetuning_scaling_factor"):
        formats.load(written(tmp_path / "missing", standard(), denied | {"finetuning_scaling_factor": True}))


@pytest.mark.parametrize(("name", "value"), [("threshold", torch.inf), ("b_enc", -torch.inf)])
def test_an_infinite_threshold_or_bias_switches_a_feature_off(tmp_path, name, value):
    state = standard() | {"threshold": drawn(D_SAE, seed=3).abs()}
    whole = formats.load(written(tmp_path / "whole", state, {"architecture": "jumprelu"})).encode(X)
    state[name][3] = value
    z = formats.load(written(tmp_path / "off", state, {"architecture": "jumprelu"})).encode(X)
    assert (z[:, 3] == 0).all()
    others = torch.arange(D_SAE) != 3
    assert torch.equal(z[:, others], whole[:, others])


def test_a_feature_without_a_direction_is_dead_where_codes_are_scaled_by_its_norm(tmp_path):
    state = standard()
    state["W_dec"][3] = 0
    sae = formats.load(written(tmp_path, state, {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}))
    z = sae.encode(X)
    assert (z[:, 3] == 0).all()
    assert (z > 0).any(0).sum() > D_SAE / 2


def linear_state() -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": drawn(D_SAE, D_IN),
        "encoder.bias": drawn(D_SAE, seed=1),
        "decoder.weight": drawn(D_IN, D_SAE, seed=2),
        "bias": drawn(D_IN, seed=3),
    }


WRAPPED = {
    "as it is": lambda state: state,
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled inside": lambda state: {name.replace(".", "._orig_mod."): tensor for name, tensor in state.items()},
    "distributed": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "of a larger module": lambda state: {f"autoencoder.{name}": tensor for name, tensor in state.items()},
    "a backup": lambda state: {"step": 5, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 1.0},
    "a checkpoint": lambda state: {"epoch": 1, "state_dict": state},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_what_training_wraps_around_weights_is_taken_off(tmp_path, wrapped):
    state = linear_state()
    folder = written(tmp_path, wrapped(state), {"trainer": {"dict_class": "AutoEncoder"}}, "ae.pt", "config.json")
    expected = ((X - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    torch.testing.assert_close(formats.load(folder).encode(X), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("trainer", "variant"), [("StandardTrainer", "relu"), ("TopKTrainer", "topk"), ("NewTrainer", None)])
def test_dictionary_learning_files_of_before_there_was_a_class_say_their_trainer(tmp_path, trainer, variant):
    state = linear_state()
    if variant == "topk":
        state["b_dec"] = state.pop("bias")
    sae = formats.load(written(tmp_path, state, {"trainer": {"trainer_class": trainer, "k": K}}, "ae.pt", "config.json"))
    assert sae.variant == variant


def test_dictionary_learning_files_without_buffers_take_k_from_their_configuration(tmp_path):
    state = linear_state()
    state["b_dec"] = state.pop("bias")
    of = {"AutoEncoderTopK": "topk", "BatchTopKSAE": None}
    for kind, variant in of.items():
        folder = written(tmp_path / kind, state, {"trainer": {"dict_class": kind, "k": K}}, "ae.pt", "config.json")
        sae = formats.load(folder)
        assert sae.variant == variant
        assert sae.k == (K if variant else None)
    assert "no threshold" in sae.about.encoder


@pytest.mark.parametrize("edition", ["params.npz", "params.safetensors"])
def test_gemma_scope_encodes_by_its_formula(tmp_path, edition):
    state = standard() | {"threshold": drawn(D_SAE, seed=3).abs()}
    names = {} if edition.endswith("npz") else {"W_enc": "w_enc", "W_dec": "w_dec"}
    old = {names.get(name, name): tensor for name, tensor in state.items()}
    config = {"hf_hook_point_in": "model.layers.3.output", "model_name": "gemma", "type": "sae"} if names else None
    sae = formats.load(written(tmp_path, old, config, edition, "config.json"))
    before = X @ state["W_enc"] + state["b_enc"]
    torch.testing.assert_close(sae.encode(X), before.relu() * (before > state["threshold"]), atol=1e-4, rtol=1e-4)
    assert torch.equal(formats.load(tmp_path / edition).W_dec, sae.W_dec)
    if config is not None:
        assert (sae.about.model, sae.about.hook_name) == ("gemma", "model.layers.3.output")
        written(tmp_path, old, config | {"hf_hook_point_out": "model.layers.4.output"}, edition, "config.json")
        with pytest.raises(UserError, match="a transcoder"):
            formats.load(tmp_path)


def test_openmoss_gives_directions(tmp_path):
    state = {"encoder.weight": drawn(D_SAE, D_IN), "encoder.bias": drawn(D_SAE), "decoder.weight": drawn(D_IN, D_SAE, seed=2)}
    folder = written(tmp_path, state, None, "checkpoints/final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps({"hook_point_in": "blocks.2.hook_resid_post"}))
    sae = formats.load(folder)
    assert torch.equal(sae.W_dec, state["decoder.weight"].T)
    assert sae.about.hook_name == "blocks.2.hook_resid_post"
    assert "normalise activations" in sae.about.encoder
    for config in ({"d_model": D_IN}, {"sae_type": "sae"}):  # another layout: weights beside config.json
        state = {"W_E": drawn(D_IN, D_SAE), "W_D": drawn(D_SAE, D_IN, seed=2), "b_E": drawn(D_SAE), "b_D": drawn(D_IN)}
        newer = written(tmp_path / str(config), state, config, configuration="config.json")
        assert torch.equal(formats.load(newer).W_dec, state["W_D"])


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    save_file({"W_dec": drawn(D_SAE, D_IN, seed=2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b_dec": drawn(D_IN)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"W_dec": "model-00001-of-00002.safetensors", "b_dec": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(formats.load(tmp_path).W_dec, drawn(D_SAE, D_IN, seed=2))
    assert torch.equal(formats.load(index).W_dec, drawn(D_SAE, D_IN, seed=2))
    index.write_text(json.dumps({"weight_map": {"W_dec": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="names weights outside its folder"):
        formats.load(tmp_path)


@pytest.mark.parametrize("name", ["W_dec", "w_dec", "W_D", "decoder", "dictionary", "decoder.weight", "autoencoder.W_dec"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_directions_are_read_under_any_name_and_the_way_round_that_biases_tell(tmp_path, name, suffix):
    W_dec = drawn(D_SAE, D_IN, seed=2)
    lies = W_dec.T if name == "decoder.weight" else W_dec
    for place, (tensor, bias) in enumerate([(lies, {}), (lies.T, {"b_dec": drawn(D_IN)}), (lies.T, {"b_enc": drawn(D_SAE)})]):
        if bias and name.startswith("autoencoder"):
            bias = {f"autoencoder.{key}": each for key, each in bias.items()}
        written(tmp_path, {name: tensor.contiguous(), **bias}, None, f"lone{place}{suffix}")
        assert torch.equal(formats.load(tmp_path / f"lone{place}{suffix}").W_dec, W_dec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_any_floating_point_is_read_in_float32(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in standard().items()}
    sae = formats.load(written(tmp_path, state, {"architecture": "standard"}))
    assert torch.equal(sae.W_dec, state["W_dec"].float())
    assert sae.W_enc.dtype == torch.float32


def test_what_a_file_says_of_its_model_and_site_is_kept(tmp_path):
    site = {"model_name": "gpt2", "hook_name": "blocks.7.hook_resid_pre"}
    top = site | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    older = {"model_name": "gpt2", "hook_point": "blocks.7.hook_resid_pre"}
    for number, config in enumerate([top, {"metadata": top}, older]):
        about = formats.load(written(tmp_path / str(number), standard(), {"architecture": "standard"} | config)).about
        assert (about.model, about.hook_name, about.centred) == (*site.values(), number < 2)


def test_all_seeds_of_an_ensemble_are_read_from_its_file_and_its_folder(tmp_path):
    ensemble = trained("topk", seeds=3)
    ensemble.save(tmp_path / "ensemble.safetensors")
    for path in (tmp_path, tmp_path / "ensemble.safetensors"):
        found = formats.load_all(path)
        assert list(found) == [f"seed {seed}" for seed in ensemble.seeds]
        for position, sae in enumerate(found.values()):
            assert torch.equal(sae.W_dec, ensemble.dictionary(position).W_dec)
    with pytest.raises(UserError, match="it holds all SAEs of an ensemble"):
        formats.load(tmp_path)


def test_a_folder_of_many_hook_points_says_which_there_are(tmp_path):
    for layer in range(7):
        written(tmp_path / f"layers.{layer}", standard(), {"k": K}, "sae.safetensors")
    with pytest.raises(UserError, match=r"there are 7 below it: give them by their paths, such as .*layers\.0.* and 2 more"):
        formats.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://huggingface.co/x/y", "SAEs are read from this machine"),
        ("s*", "nothing here matches this pattern"),
        ("one,two", "separate paths by blanks"),
        ("three", "check the path"),
        ("link", "a link to a file that is not there"),
        ("one", "cfg.json: missing|a link to a file that is not there"),
    ],
)
def test_paths_at_which_there_is_nothing_are_explained(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sae_weights.safetensors").symlink_to("/nowhere/blob")
    (tmp_path / "link").symlink_to("/nowhere/blob")
    with pytest.raises(UserError, match=said):
        formats.load(path)


def test_a_file_that_holds_itself_is_no_loop(tmp_path):
    state: dict = {"W_dec": drawn(D_SAE, D_IN)}
    state["model"] = state
    torch.save(state, tmp_path / "x.pt")
    assert torch.equal(formats.load(tmp_path / "x.pt").W_dec, drawn(D_SAE, D_IN))
