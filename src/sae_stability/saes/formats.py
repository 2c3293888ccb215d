"""SAEs in the files of other libraries: SAELens, sparsify and dictionary_learning in, the first two out.

Nothing is unpickled: `.pt` files are read as plain tensors (`weights_only`), and anything else in them is refused.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.files import save_tensors, write_json
from sae_stability.saes.batchtopk import BatchTopKParameters
from sae_stability.saes.gated import GatedParameters
from sae_stability.saes.jumprelu import JumpReLUParameters
from sae_stability.saes.sae import SAE
from sae_stability.saes.sparse import Parameters

SAELENS, SPARSIFY, DICTIONARY_LEARNING = "sae_weights.safetensors", "sae.safetensors", "ae.pt"
FORMATS = ("saelens", "sparsify")
DECODERS = ("W_dec", "decoder.weight", "decoder")  # names under which a lone file may hold its directions
SMALLEST_THRESHOLD = 1e-30  # of a JumpReLU feature, whose logarithm is kept; one of zero or less is plain ReLU

State = dict[str, Tensor]


def load(path: Path | str) -> SAE:
    """Read an SAE: a folder of SAELens, sparsify or dictionary_learning, or a safetensors file with a named decoder.

    SAELens's standard, gated, jumprelu, topk and batchtopk architectures are known, its BatchTopK and Matryoshka SAEs saved as
    jumprelu too; so are the `dict_class`es of dictionary_learning that have an encoder of ours. Weights come out in float32.

    Raises `UserError` for anything else: no such file, a folder without an SAE, a damaged or pickled file, weights that are not
    finite or that don't fit each other, an architecture or a normalisation that is not known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    readers: dict[str, Callable[[Path], SAE]] = {
        SAELENS: _from_saelens,
        SPARSIFY: _from_sparsify,
        DICTIONARY_LEARNING: _from_dictionary_learning,
    }
    configured = path.name in readers and (path.parent / ("config.json" if path.suffix == ".pt" else "cfg.json")).is_file()
    folder = path.parent if configured else path
    try:
        if not folder.is_dir():
            sae = _from_file(path)
        else:
            found = next((name for name in readers if (folder / name).is_file()), None)
            if found is None:
                raise UserError(f"{path}: no SAE in this folder; it should hold one of {', '.join(readers)}{_below(path, readers)}")
            sae = readers[found](folder)
    except KeyError as missing:
        raise UserError(f"{path}: no tensor {missing} among the weights") from None
    _check(path, sae)
    return sae


def save(sae: SAE, path: Path | str, format: str = "saelens") -> None:
    """Write an SAE to the folder `path` so that SAELens, or sparsify, loads it.

    SAELens takes every variant (batchtopk and matryoshka as jumprelu with one threshold, as it saves them itself); sparsify takes
    topk only. Raises `UserError` for other formats and variants.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format} cannot be written; use {' or '.join(FORMATS)}")
    if sae.variant is None:
        raise UserError("SAE: it has no encoder, and cannot be written as one")
    path = Path(path)
    d_sae, d_in = sae.W_dec.shape
    given = sae.parameters._asdict()
    if format == "sparsify":
        if sae.variant != "topk":
            raise UserError(f"format: sparsify has topk only, and this SAE is {sae.variant}; use format saelens")
        names = {"W_enc_rows": "encoder.weight", "b_enc": "encoder.bias"}
        config = {"activation": "topk", "num_latents": d_sae, "expansion_factor": max(1, d_sae // d_in), "k": sae.k}
        config |= {"normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
        _write(path, SPARSIFY, {names.get(name, name): tensor for name, tensor in given.items()}, config)
        return
    state = {name: tensor for name, tensor in given.items() if name != "W_enc_rows"} | {"W_enc": sae.W_enc}
    if "log_threshold" in state:
        state["threshold"] = state.pop("log_threshold").exp()
    elif "threshold" in state:
        state["threshold"] = state["threshold"].expand(d_sae)
    if sae.variant == "gated":
        state["b_gate"] = state.pop("b_enc")
    architecture = {"relu": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(sae.variant, sae.variant)
    config = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", "metadata": {}}
    if sae.variant == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    _write(path, SAELENS, state, config)


def _write(folder: Path, name: str, state: State, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cfg.json", config)
    save_tensors(folder / name, state, {})


def _from_saelens(folder: Path) -> SAE:
    config, state = _config(folder / "cfg.json"), _tensors(folder / SAELENS)
    architecture = _wanted(config, "architecture", folder / "cfg.json")
    if (config.get("normalize_activations") or "none") != "none":
        kind = config["normalize_activations"]
        raise UserError(f"{folder}: activations are normalised at run time ({kind}); fold that in with SAELens, and save it again")
    if "log_threshold" in state:  # of older training checkpoints
        state["threshold"] = state.pop("log_threshold").exp()
    W_dec, d_sae = state["W_dec"], len(state["W_dec"])
    weights = Parameters(state["W_enc"].T, state.get("b_enc", torch.zeros(d_sae)), W_dec, state["b_dec"])
    if not config.get("apply_b_dec_to_input", True):  # pre = W x + b = W (x - b_dec) + (b + W b_dec)
        shift = weights.W_enc_rows @ weights.b_dec
        weights = weights._replace(b_enc=weights.b_enc + shift)
        for bias, scale in (("b_gate", 1.0), ("b_mag", state.get("r_mag", torch.zeros(d_sae)).exp())):
            if bias in state:
                state[bias] = state[bias] + shift * scale
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1)
        unit = W_dec / norms[:, None]
        weights = weights._replace(W_enc_rows=weights.W_enc_rows * norms[:, None], b_enc=weights.b_enc * norms, W_dec=unit)
    if architecture in ("standard", "standard_transcoder"):
        return SAE("relu", None, weights)
    if architecture == "gated":
        return SAE("gated", None, GatedParameters(*weights._replace(b_enc=state["b_gate"]), state["r_mag"], state["b_mag"]))
    if architecture == "topk":
        return SAE("topk", int(_wanted(config, "k", folder / "cfg.json")), weights)
    if architecture == "jumprelu":
        return _with_thresholds(weights, state["threshold"])
    if architecture in ("batchtopk", "matryoshka_batchtopk"):  # of a training checkpoint
        return SAE("batchtopk", int(config["k"]), BatchTopKParameters(*weights, state["topk_threshold"].reshape(())))
    raise UserError(f"{folder}: SAELens architecture {architecture} is not known here")


def _from_sparsify(folder: Path) -> SAE:
    config, state = _config(folder / "cfg.json"), _tensors(folder / SPARSIFY)
    if config.get("transcode") or config.get("skip_connection"):
        raise UserError(f"{folder}: a transcoder; its decoder writes elsewhere than its encoder reads")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{folder}: sparsify activation {config['activation']} is not known here")
    weights = Parameters(state["encoder.weight"], state["encoder.bias"], state["W_dec"], state["b_dec"])
    return SAE("topk", int(_wanted(config, "k", folder / "cfg.json")), weights)


def _from_dictionary_learning(folder: Path) -> SAE:
    trainer, state = _config(folder / "config.json").get("trainer", {}), _tensors(folder / DICTIONARY_LEARNING)
    kind = _wanted(trainer, "dict_class", folder / "config.json")
    if "encoder.weight" in state:  # of nn.Linear; the decoder is transposed then
        state |= {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T}
    b_dec = state[next((name for name in ("bias", "decoder_bias") if name in state), "b_dec")]
    b_enc = next((state[name] for name in ("b_enc", "encoder.bias") if name in state), torch.zeros(len(state["W_dec"])))
    weights = Parameters(state["W_enc"].T, b_enc, state["W_dec"], b_dec)
    if kind == "AutoEncoder":
        return SAE("relu", None, weights)
    if kind == "AutoEncoderNew":  # its encoder does not subtract the decoder's bias
        return SAE("relu", None, weights._replace(b_enc=b_enc + weights.W_enc_rows @ b_dec))
    if kind == "GatedAutoEncoder":
        gated = weights._replace(b_enc=state["gate_bias"])
        return SAE("gated", None, GatedParameters(*gated, state["r_mag"], state["mag_bias"]))
    if kind == "JumpReluAutoEncoder":  # nor does this one, unless told to, which its file does not say
        return _with_thresholds(weights._replace(b_enc=b_enc + weights.W_enc_rows @ b_dec), state["threshold"])
    if kind == "AutoEncoderTopK":
        return SAE("topk", int(state["k"]), weights)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return SAE("batchtopk", int(state["k"]), BatchTopKParameters(*weights, state["threshold"].clamp(min=0).reshape(())))
    raise UserError(f"{folder}: dictionary_learning class {kind} is not known here")


def _from_file(path: Path) -> SAE:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: give an SAE's folder, or a .safetensors file; other files are not read")
    state = _tensors(path)
    name = next((name for name in DECODERS if name in state), None)
    if name is None or state[name].ndim != 2:
        raise UserError(f"{path}: no decoder under the names {', '.join(DECODERS)}; it has {', '.join(sorted(state)) or 'nothing'}")
    W_dec = state[name].T if name == "decoder.weight" else state[name]  # of nn.Linear
    return SAE(None, None, Parameters(torch.empty(0, W_dec.shape[1]), torch.empty(0), W_dec, torch.zeros(W_dec.shape[1])))


def _with_thresholds(weights: Parameters, threshold: Float[Tensor, "d_sae"]) -> SAE:
    return SAE("jumprelu", None, JumpReLUParameters(*weights, threshold.clamp(min=SMALLEST_THRESHOLD).log()))


def _config(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; an SAE's folder holds it beside the weights") from None
    except ValueError:
        raise UserError(f"{path}: no valid JSON") from None


def _wanted(config: dict, key: str, path: Path):
    if key not in config:
        raise UserError(f"{path}: no field {key}")
    return config[key]


def _tensors(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".pt" else load_file(path)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds pickled objects, not only tensors; it is not opened, since that could run code") from None
    except (SafetensorError, RuntimeError, EOFError):
        raise UserError(f"{path}: damaged or truncated; get the file again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _check(path: Path, sae: SAE) -> None:
    """Weights must be finite, of fitting shapes, and not all zero."""
    d_sae, d_in = sae.W_dec.shape
    if sae.variant is not None and (sae.parameters.W_enc_rows.shape != (d_sae, d_in) or sae.parameters.b_enc.shape != (d_sae,)):
        raise UserError(f"{path}: encoder {list(sae.W_enc.shape)} and decoder {[d_sae, d_in]} don't fit each other")
    for name, tensor in sae.parameters._asdict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite weights; that SAE is broken")
    if not sae.W_dec.any():
        raise UserError(f"{path}: every weight of the decoder is zero; that SAE is broken")


def _below(path: Path, names) -> str:
    """Where an SAE lies in a folder below this one, as a hint."""
    found = sorted({file.parent for name in names for file in path.rglob(name)})
    return f"; there is one in {found[0]}" if found else ""
