"""Files that are no SAE: each ends in one line that names the file and the mend, whatever is wrong with it."""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_stability.errors import UserError
from sae_stability.saes import formats
from sae_stability.saes.sae import SAE

D_IN, D_SAE, K = 4, 10, 3
X = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(9))


def whole(library: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and configuration of an SAE as a library writes it; `library` may name an architecture of SAELens too."""
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(D_IN, D_SAE, generator=generator), torch.randn(D_SAE, D_IN, generator=generator)
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(D_IN, generator=generator)
    if library == "sparsify":
        state = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        return state, {"k": K, "d_in": D_IN, "activation": "topk", "transcode": False, "skip_connection": False}
    if library == "dictionary_learning":
        state = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T, "b_dec": b_dec, "k": torch.tensor(K)}
        return state, {"trainer": {"dict_class": "AutoEncoderTopK"}}
    architecture = "topk" if library == "saelens" else library
    state = {"W_enc": W_enc, "b_gate" if architecture == "gated" else "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    state |= {"r_mag": b_enc.clone(), "b_mag": b_enc.clone()} if architecture == "gated" else {}
    state |= {"threshold": b_enc.abs()} if architecture == "jumprelu" else {}
    state |= {"topk_threshold": torch.tensor(0.5)} if architecture == "batchtopk" else {}
    return state, {"architecture": architecture, "k": K, "apply_b_dec_to_input": True}


def write(folder, library: str, state: dict, config) -> tuple:
    """Write what `whole` gives, or what was made of it; the paths of weights and configuration."""
    names = {"sparsify": ("sae.safetensors", "cfg.json"), "dictionary_learning": ("ae.pt", "config.json")}
    weights, configuration = (folder / name for name in names.get(library, ("sae_weights.safetensors", "cfg.json")))
    torch.save(state, weights) if weights.suffix == ".pt" else save_file(state, weights)
    configuration.write_text(config if isinstance(config, str) else json.dumps(config))
    return weights, configuration


@pytest.mark.parametrize("library", ["saelens", "standard", "gated", "jumprelu", "batchtopk", "sparsify", "dictionary_learning"])
def test_nothing_is_wrong_with_what_is_broken_here(tmp_path, library):
    write(tmp_path, library, *whole(library))
    assert formats.load(tmp_path).encode(X).shape == (20, D_SAE)


W = torch.ones(D_SAE, D_IN)
TENSORS = [  # the library, what is changed, to what (None: missing), and what the line says
    ("saelens", "W_dec", torch.ones(D_SAE), r"W_dec has shape \[10\] and should have \[d_sae, d_in\]"),
    ("saelens", "W_dec", torch.ones(1, D_SAE, D_IN), "W_dec has shape"),
    ("saelens", "W_dec", torch.ones(0, D_IN), "W_dec has shape"),
    ("saelens", "W_dec", torch.zeros(D_SAE, D_IN), "every weight of W_dec"),
    ("saelens", "W_dec", torch.full((D_SAE, D_IN), torch.nan), "W_dec holds NaN"),
    ("saelens", "W_dec", W.long(), "W_dec is int64, not floating point"),
    ("saelens", "W_dec", None, "no tensor W_dec"),
    ("saelens", "W_enc", None, "no tensor W_enc"),
    ("saelens", "W_enc", W, "don't fit each other"),
    ("saelens", "b_enc", None, "no tensor b_enc"),
    ("standard", "b_enc", torch.ones(D_SAE + 1), "b_enc .* don't fit each other"),
    ("standard", "b_enc", torch.ones(1), "b_enc .* don't fit each other"),  # it would be broadcast
    ("standard", "b_dec", torch.ones(1), "b_dec .* don't fit each other"),
    ("standard", "b_dec", torch.ones(D_IN, 1), "b_dec .* don't fit each other"),
    ("standard", "b_dec", torch.full((D_IN,), torch.inf), "b_dec holds NaN or infinite"),
    ("gated", "b_gate", torch.ones(1), "b_gate .* don't fit each other"),
    ("gated", "b_mag", torch.ones(D_SAE - 1), "b_mag .* don't fit each other"),
    ("gated", "r_mag", torch.ones(()), "r_mag .* don't fit each other"),
    ("gated", "r_mag", None, "no tensor r_mag"),
    ("jumprelu", "threshold", torch.ones(D_SAE + 2), "threshold .* don't fit each other"),
    ("jumprelu", "threshold", torch.full((D_SAE,), torch.nan), "threshold holds NaN"),
    ("jumprelu", "threshold", None, "no tensor threshold"),
    ("batchtopk", "topk_threshold", torch.ones(2), "topk_threshold has shape"),
    ("batchtopk", "topk_threshold", torch.tensor(1), "topk_threshold is int64"),
    ("sparsify", "encoder.weight", torch.ones(D_SAE, D_IN + 1), "encoder.weight .* don't fit each other"),
    ("sparsify", "encoder.bias", None, "no tensor encoder.bias"),
    ("dictionary_learning", "k", torch.tensor(D_SAE + 1), "k is 11, and 1 to 10 features can fire"),
    ("dictionary_learning", "k", torch.tensor([1, 2]), "k is a list and should be a whole number"),
    ("dictionary_learning", "k", torch.tensor(1 + 1j), "k is .* and should be a whole number"),
    ("dictionary_learning", "k", torch.tensor(True), "k is true and should be a whole number"),
    ("dictionary_learning", "decoder.weight", torch.ones(D_IN, D_SAE).to_sparse(), "decoder.weight is no plain dense tensor"),
    ("dictionary_learning", "b_dec", None, "no tensor b_dec"),
    ("dictionary_learning", "b_dec", torch.ones(D_IN, dtype=torch.complex64), "b_dec is complex64"),
    ("dictionary_learning", "b_dec", 3.0, "no tensor b_dec"),
    ("saelens", "b_enc", torch.full((D_SAE,), torch.inf), "b_enc holds NaN or infinite"),
    ("saelens", "W_dec", torch.ones(D_SAE, 2, D_IN), "three dimensions are those of a crosscoder"),
]


@pytest.mark.parametrize(("library", "name", "value", "said"), TENSORS)
def test_a_broken_tensor_is_said_in_one_line(tmp_path, library, name, value, said):
    state, config = whole(library)
    state = {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}
    weights, _ = write(tmp_path, library, state, config)
    refused(tmp_path, weights, said)


FIELDS = [  # the library, the field (None: the whole file), its value, and what the line says
    *(("saelens", None, value, "the file is .* and should be a JSON object") for value in ("null", "7", '"topk"', "[1, 2]")),
    ("dictionary_learning", None, "[]", "the file is a list and should be a JSON object"),
    ("saelens", None, "{", "no valid JSON"),
    ("saelens", None, "[" * 100_000, "no valid JSON"),
    ("saelens", "k", None, "no field k"),
    *(("saelens", "k", value, "k is .* and should be a whole number") for value in (["null"], "eight", 2.5, True, [3], {})),
    *(("saelens", "k", value, f"k is {value}, and 1 to 10 features can fire") for value in (0, -1, D_SAE + 1, 10**30)),
    ("saelens", "k", float("nan"), "k is NaN and should be a whole number"),
    ("batchtopk", "k", float("inf"), "k is Infinity and should be a whole number"),
    ("batchtopk", "k", 0.5, "k is 0.5 and should be a whole number"),
    ("batchtopk", "k", None, "no field k"),
    ("saelens", "architecture", 3, "architecture is 3 and should be a string"),
    *(("saelens", "architecture", name, "a transcoder") for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder")),
    ("saelens", "apply_b_dec_to_input", "false", "apply_b_dec_to_input is .* and should be true or false"),
    ("saelens", "rescale_acts_by_decoder_norm", 1, "rescale_acts_by_decoder_norm is 1 and should be true or false"),
    ("saelens", "hook_name_out", "blocks.1.hook_mlp_out", "a transcoder"),
    ("saelens", "is_transcoder", True, "a transcoder"),
    ("saelens", "normalize_activations", {"kind": "layer_norm"}, "normalize_activations is an object and should be a string"),
    ("sparsify", "k", None, "no field k"),
    ("sparsify", "k", 99, "k is 99, and 1 to 10 features can fire"),
    ("sparsify", "signed", True, "its codes have a sign"),
    ("sparsify", "transcode", True, "a transcoder"),
    ("sparsify", "skip_connection", True, "a transcoder"),
    ("dictionary_learning", "trainer", None, "no field trainer"),
    ("dictionary_learning", "trainer", ["null"], "trainer is null and should be a JSON object"),
    ("dictionary_learning", "trainer", "AutoEncoder", "trainer is .* and should be a JSON object"),
    ("dictionary_learning", "trainer", {"dict_class": 4}, "dict_class is 4 and should be a string"),
]
ALONE = [  # the library, what is changed in its configuration, or which file is renamed, and why its directions stand alone
    ("saelens", {"architecture": "temporal"}, "architecture 'temporal' is not known here"),
    ("saelens", {"architecture": "two\nlines"}, "is not known here"),
    *(
        ("saelens", {"normalize_activations": value}, "normalised at run time")
        for value in ("layer_norm", "expected_average_only_in", "constant_norm_rescale", True)
    ),
    ("standard", {"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu' is not known here"),
    ("sparsify", {"activation": "groupmax"}, "activation 'groupmax' is not known here"),
    ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "class 'CrossCoder' is not known here"),
    ("dictionary_learning", {"trainer": {}}, "does not say of which class it is"),
    ("dictionary_learning", "config.json", "config.json is missing, so its class is not known"),
    ("saelens", "sae_weights.safetensors", "other.safetensors is of no library that is known here"),
]


@pytest.mark.parametrize(("library", "change", "said"), ALONE)
def test_directions_stand_alone_where_the_encoder_is_not_understood(tmp_path, library, change, said):
    state, config = whole(library)
    write(tmp_path, library, state, config | (change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        (tmp_path / change).rename(tmp_path / f"other{(tmp_path / change).suffix}")
    sae = formats.load(tmp_path)
    assert torch.equal(sae.W_dec, state["W_dec"] if "W_dec" in state else state["decoder.weight"].T)
    assert said in sae.about.encoder
    with pytest.raises(UserError, match="its directions can be compared, and it does not fire") as error:
        sae.encode(X)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("library", "field", "value", "said"), FIELDS)
def test_a_broken_configuration_is_said_in_one_line(tmp_path, library, field, value, said):
    state, config = whole(library)
    if field is None:
        config = value
    elif value is None:
        del config[field]
    else:
        config[field] = None if value == ["null"] else value
    _, configuration = write(tmp_path, library, state, config)
    refused(tmp_path, configuration, said)


def test_a_broken_file_is_said_in_one_line(tmp_path):
    weights, configuration = write(tmp_path, "saelens", *whole("saelens"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-50])
    refused(tmp_path, weights, "damaged or truncated")
    weights.write_bytes(b"")
    refused(tmp_path, weights, "damaged or truncated")
    weights.write_bytes(good)
    configuration.unlink()
    refused(tmp_path, configuration, "missing; an SAE's folder holds it")
    configuration.mkdir()
    refused(tmp_path, configuration, "can't be read")
    weights.rename(tmp_path / "model.gguf")
    refused(tmp_path, tmp_path, "no SAE in this folder")
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "no such file or folder")


def test_a_lone_file_without_directions_is_said_in_one_line(tmp_path):
    lone, other = tmp_path / "lone.safetensors", tmp_path / "weights.bin"
    for state, said in [
        ({"embedding": torch.ones(3, 2), "two\nlines": torch.ones(1)}, "no decoder among its tensors"),
        ({}, "no decoder among its tensors .it has none."),
        ({"W_dec": torch.ones(3)}, r"W_dec has shape \[3\]"),
        ({"decoder": torch.ones(3, 2, dtype=torch.int64)}, "decoder is int64"),
    ]:
        save_file(state, lone)
        refused(lone, lone, said)
    other.write_bytes(b"1")
    refused(other, other, "not opened, since that could run code")
    (tmp_path / "weights.gguf").write_bytes(b"1")
    refused(tmp_path / "weights.gguf", tmp_path / "weights.gguf", "other files than .safetensors, .npz, .pt")


def refused(path, file, said: str) -> None:
    """Loading `path` ends in one line about `file` that matches `said` and ends with a mend."""
    with pytest.raises(UserError) as error:
        formats.load(path)
    line = str(error.value)
    assert line.startswith(f"{file}: "), line
    assert re.search(said, line), line
    assert "\n" not in line
    assert "; " in line


shapes = st.lists(st.integers(0, 12), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def breakages(draw):
    """What to do with an SAE's folder: a tensor dropped, renamed, reshaped or retyped, a field changed, bytes cut or changed."""
    library = draw(st.sampled_from(["saelens", "gated", "jumprelu", "batchtopk", "sparsify", "dictionary_learning"]))
    state, config = whole(library)
    for kind in draw(st.lists(st.sampled_from(["drop", "rename", "reshape", "retype", "value", "field", "config"]), max_size=2)):
        name = draw(st.sampled_from(sorted(state))) if state else None
        if kind in ("field", "config"):
            fields = config.get("trainer", config) if isinstance(config, dict) else None
            if kind == "config" or not isinstance(fields, dict) or not fields:
                config = draw(json_values)
            else:
                fields[draw(st.sampled_from([*fields, "rescale_acts_by_decoder_norm", "transcode"]))] = draw(json_values)
        elif name is None:
            continue
        elif kind == "drop":
            del state[name]
        elif kind == "rename":
            state[draw(st.sampled_from([*whole(library)[0], "log_threshold", "other"]))] = state.pop(name).clone()
        elif kind == "reshape":
            state[name] = torch.ones(draw(shapes))
        elif kind == "retype":
            state[name] = state[name].to(draw(dtypes))
        else:
            state[name] = torch.full_like(state[name], draw(st.sampled_from([0, -1, 1, 5, 100])))
    cut = draw(st.none() | st.integers(0, 3000))
    flipped = draw(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=3))
    return library, state, config, cut, flipped


@given(breakages())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_is_broken_loading_gives_an_sae_that_encodes_or_one_line(tmp_path_factory, breakage):
    library, state, config, cut, flipped = breakage
    folder = tmp_path_factory.mktemp("broken")
    weights, _ = write(folder, library, {name: tensor.contiguous() for name, tensor in state.items()}, config)
    content = bytearray(weights.read_bytes()[:cut])
    for place, value in flipped:
        if place < len(content):
            content[place] = value
    weights.write_bytes(content)
    try:
        sae = formats.load(folder)
    except UserError as error:
        line, sae = str(error), None
    if sae is None:
        assert len(line.splitlines()) == 1
        assert str(folder) in line
        return
    assert isinstance(sae, SAE)
    if sae.variant is None:
        with pytest.raises(UserError, match="its directions can be compared"):
            sae.encode(torch.ones(2, sae.W_dec.shape[1]))
        return
    z = sae.encode(torch.ones(2, sae.W_dec.shape[1]))
    assert z.shape == (2, len(sae.W_dec))
    assert sae.decode(z).shape == (2, sae.W_dec.shape[1])
