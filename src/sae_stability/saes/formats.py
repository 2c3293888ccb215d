"""SAEs in the files of other libraries: SAELens, sparsify and dictionary_learning in, the first two out.

What each library computes from its tensors is said here; `reading.py` checks that a file has them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.files import save_tensors, write_json
from sae_stability.saes import variant
from sae_stability.saes.batchtopk import BatchTopKParameters
from sae_stability.saes.gated import GatedParameters
from sae_stability.saes.jumprelu import JumpReLUParameters
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import Config, Weights
from sae_stability.saes.sae import SAE

SAELENS, SPARSIFY, DICTIONARY_LEARNING = "sae_weights.safetensors", "sae.safetensors", "ae.pt"
FORMATS = ("saelens", "sparsify")
SAELENS_FORMAT = "6.0.0"  # that a file is of: SAELens takes one that says nothing for an older one, and drops its metadata
DECODERS = ("W_dec", "decoder.weight", "decoder")  # names under which a lone file may hold its directions
SMALLEST_THRESHOLD = 1e-30  # of a JumpReLU feature, whose logarithm is kept; one of zero or less is plain ReLU
TRANSCODER = "a transcoder, whose decoder writes elsewhere than its encoder reads; give an SAE"
# The classes of dictionary_learning that have an encoder of ours, and the name of the decoder's bias in each.
DICTIONARIES = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
}


def load(path: Path | str) -> SAE:
    """Read an SAE: a folder of SAELens, sparsify or dictionary_learning, or a safetensors file with a named decoder.

    SAELens's standard, gated, jumprelu, topk and batchtopk architectures are known, its BatchTopK and Matryoshka SAEs saved as
    jumprelu too; so are the `dict_class`es of dictionary_learning that have an encoder of ours. Weights come out in float32.

    Raises `UserError` for anything else: no such file, a folder without an SAE, a damaged or pickled file, weights that are not
    finite or that don't fit each other, a k that can't be, an architecture or a normalisation that is not known, a transcoder.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    readers: dict[str, Callable[[Path], SAE]] = {
        SAELENS: _from_saelens,
        SPARSIFY: _from_sparsify,
        DICTIONARY_LEARNING: _from_dictionary_learning,
    }
    configured = path.name in readers and (path.parent / ("config.json" if path.suffix == ".pt" else "cfg.json")).is_file()
    folder = path.parent if configured else path
    if not folder.is_dir():
        return _from_file(path)
    library = path.name if configured else next((name for name in readers if (folder / name).is_file()), None)
    if library is None:
        raise UserError(f"{path}: no SAE in this folder; it should hold one of {', '.join(readers)}{_below(path, readers)}")
    return readers[library](folder)


def save(sae: SAE, path: Path | str, format: str = "saelens", metadata: dict | None = None) -> None:
    """Write an SAE to the folder `path` so that SAELens, or sparsify, loads it, with `metadata` (JSON values) in its configuration.

    SAELens takes every variant (batchtopk and matryoshka as jumprelu with one threshold, as it saves them itself); sparsify takes
    topk only. Raises `UserError` for other formats and variants.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format} cannot be written; use {' or '.join(FORMATS)}")
    if sae.variant is None:
        raise UserError("SAE: it has no encoder, and cannot be written as one; give an SAE that encodes")
    if sae.removed is not None:
        raise UserError("SAE: features were removed from it, which no file can say; write the whole SAE")
    path = Path(path)
    d_sae, d_in = sae.W_dec.shape
    if format == "sparsify":
        if sae.variant != "topk":
            raise UserError(f"format: sparsify has topk only, and this SAE is {sae.variant}; use format saelens")
        names = {"W_enc_rows": "encoder.weight", "b_enc": "encoder.bias"}
        config = {
            "activation": "topk",
            "num_latents": d_sae,
            "expansion_factor": max(1, d_sae // d_in),
            "k": sae.k,
            "metadata": metadata or {},
        }
        config |= {"normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
        state = {names.get(name, name): tensor for name, tensor in sae.parameters._asdict().items()}
        _write(path, SPARSIFY, state, config)
        return
    config = variant(sae.variant)(sae.k or 0).saelens()
    config |= {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {"sae_lens_version": SAELENS_FORMAT} | (metadata or {})
    _write(path, SAELENS, sae.parameters.exported(), config)


def _write(folder: Path, name: str, state: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cfg.json", config)
    save_tensors(folder / name, state, {})


def _from_saelens(folder: Path) -> SAE:
    config = Config.read(folder / "cfg.json")
    architecture = config.text("architecture")
    if architecture.endswith("transcoder"):
        raise UserError(f"{config.path}: {TRANSCODER}")
    normalisation = config.text("normalize_activations", "none")
    if normalisation != "none":
        raise UserError(
            f"{config.path}: activations are normalised at run time ({normalisation!r}); fold that in with SAELens, and save again"
        )
    weights = Weights.read(folder / SAELENS)
    W_dec = weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    W_enc_rows, b_dec = weights.fitting("W_enc", d_in, d_sae).T, weights.fitting("b_dec", d_in)
    b_enc = weights.fitting("b_gate" if architecture == "gated" else "b_enc", d_sae)
    subtracted = config.flag("apply_b_dec_to_input", True)
    shift = 0 if subtracted else W_enc_rows @ b_dec  # pre = W x + b = W (x - b_dec) + (b + W b_dec)
    sae = Parameters(W_enc_rows, b_enc + shift, W_dec, b_dec)
    if config.flag("rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=1)
        if not norms.all():
            raise UserError(f"{weights.path}: a direction of W_dec is zero, and codes are scaled by its norm; leave that SAE out")
        sae = Parameters(W_enc_rows * norms[:, None], sae.b_enc * norms, W_dec / norms[:, None], b_dec)
    if architecture == "standard":
        return SAE("relu", None, sae)
    if architecture == "gated":
        r_mag, b_mag = weights.fitting("r_mag", d_sae), weights.fitting("b_mag", d_sae)
        return SAE("gated", None, GatedParameters(*sae, r_mag, b_mag + shift * r_mag.exp()))
    if architecture == "topk":
        return SAE("topk", config.k(d_sae), sae)
    if architecture == "jumprelu":
        if "log_threshold" in weights:  # of older training checkpoints
            return SAE("jumprelu", None, _with_thresholds(sae, weights.fitting("log_threshold", d_sae).exp()))
        return SAE("jumprelu", None, _with_thresholds(sae, weights.fitting("threshold", d_sae)))
    if architecture in ("batchtopk", "matryoshka_batchtopk"):  # of a training checkpoint
        return SAE("batchtopk", config.average_k(d_sae), _with_one_threshold(sae, weights.number("topk_threshold")))
    raise UserError(f"{config.path}: SAELens architecture {architecture!r} is not known here; give one of those that load() names")


def _from_sparsify(folder: Path) -> SAE:
    config = Config.read(folder / "cfg.json")
    if config.flag("transcode", False) or config.flag("skip_connection", False):
        raise UserError(f"{config.path}: {TRANSCODER}")
    activation = config.text("activation", "topk")
    if activation != "topk":
        raise UserError(f"{config.path}: sparsify activation {activation!r} is not known here; give an SAE with topk")
    weights = Weights.read(folder / SPARSIFY)
    W_dec = weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    encoder = weights.fitting("encoder.weight", d_sae, d_in), weights.fitting("encoder.bias", d_sae)
    return SAE("topk", config.k(d_sae), Parameters(*encoder, W_dec, weights.fitting("b_dec", d_in)))


def _from_dictionary_learning(folder: Path) -> SAE:
    config = Config.read(folder / "config.json").section("trainer")
    kind = config.text("dict_class")
    if kind not in DICTIONARIES:
        raise UserError(
            f"{config.path}: dictionary_learning class {kind!r} is not known here; give one of {', '.join(DICTIONARIES)}"
        )
    weights = Weights.read(folder / DICTIONARY_LEARNING)
    linear = "encoder.weight" in weights  # of nn.Linear, which has matrices the other way round
    W_dec = weights.decoder("decoder.weight", transposed=True) if linear else weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    W_enc_rows = weights.fitting("encoder.weight", d_sae, d_in) if linear else weights.fitting("W_enc", d_in, d_sae).T
    bias = {"GatedAutoEncoder": "gate_bias", "JumpReluAutoEncoder": "b_enc"}.get(kind, "encoder.bias" if linear else "b_enc")
    b_enc, b_dec = weights.fitting(bias, d_sae), weights.fitting(DICTIONARIES[kind], d_in)
    sae = Parameters(W_enc_rows, b_enc, W_dec, b_dec)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        # Their encoders do not subtract the decoder's bias (the second's may be told to, which its file does not say).
        sae = sae._replace(b_enc=b_enc + W_enc_rows @ b_dec)
    if kind == "GatedAutoEncoder":
        return SAE("gated", None, GatedParameters(*sae, weights.fitting("r_mag", d_sae), weights.fitting("mag_bias", d_sae)))
    if kind == "JumpReluAutoEncoder":
        return SAE("jumprelu", None, _with_thresholds(sae, weights.fitting("threshold", d_sae)))
    if kind == "AutoEncoderTopK":
        return SAE("topk", weights.k(d_sae), sae)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return SAE("batchtopk", weights.k(d_sae), _with_one_threshold(sae, weights.number("threshold")))
    return SAE("relu", None, sae)


def _from_file(path: Path) -> SAE:
    """Directions only. The encoder is zero, without taking memory."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: other files than .safetensors are not read; give an SAE's folder, or a .safetensors file")
    weights = Weights.read(path)
    name = next((name for name in DECODERS if name in weights), None)
    if name is None:
        raise UserError(f"{path}: no decoder among its tensors ({weights.names()}); name it {' or '.join(DECODERS)}")
    W_dec = weights.decoder(name, transposed=name == "decoder.weight")  # of nn.Linear
    zero = torch.zeros(())
    return SAE(None, None, Parameters(zero.expand_as(W_dec), zero.expand(len(W_dec)), W_dec, torch.zeros(W_dec.shape[1])))


def _with_thresholds(sae: Parameters, threshold: Float[Tensor, "d_sae"]) -> JumpReLUParameters:
    return JumpReLUParameters(*sae, threshold.clamp(min=SMALLEST_THRESHOLD).log())


def _with_one_threshold(sae: Parameters, threshold: Float[Tensor, ""]) -> BatchTopKParameters:
    return BatchTopKParameters(*sae, threshold.clamp(min=0))


def _below(path: Path, names) -> str:
    """Where an SAE lies in a folder below this one, as a hint."""
    found = sorted({file.parent for name in names for file in path.rglob(name)})
    return f"; there is one in {found[0]}" if found else ""
