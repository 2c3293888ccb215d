"""dictionary_learning of Marks and others: `ae.pt` beside `config.json`."""

from dataclasses import replace
from pathlib import Path

from sae_stability.saes.gated import GatedParameters
from sae_stability.saes.libraries.common import with_one_threshold, with_thresholds
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import About, Config, Loaded, Weights, directions_only

WEIGHTS, CONFIG = "ae.pt", "config.json"
DICTIONARIES = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
}
"""The classes that have an encoder of ours, and the name of the decoder's bias in each."""
TRAINERS = {
    **dict.fromkeys(("StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer"), "AutoEncoder"),
    **{"GatedSAETrainer": "GatedAutoEncoder", "GatedAnnealTrainer": "GatedAutoEncoder"},
    **{"TopKTrainer": "AutoEncoderTopK", "BatchTopKTrainer": "BatchTopKSAE", "JumpReluTrainer": "JumpReluAutoEncoder"},
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
}
"""What older files say in place of a class."""


def read(folder: Path) -> Loaded:
    """The classes of `DICTIONARIES`, and their backups (`{step, ae, optimizer}`). Directions alone of others, and where a file does
    not say of which class it is.

    Raises `UserError` for files that contradict themselves.
    """
    weights = Weights.read(folder / WEIGHTS)
    if not (folder / CONFIG).exists():
        return directions_only(weights.directions(), About(folder, encoder=f"{CONFIG} is missing, so its class is not known"))
    config = Config.read(folder / CONFIG).section("trainer")
    kind = config.text("dict_class", TRAINERS.get(config.hint("trainer_class") or "", "not said"))
    about = About(folder, config.hint("lm_name"), _site(config))

    def alone(reason: str) -> Loaded:
        return directions_only(weights.directions(), replace(about, encoder=reason))

    if kind == "not said":
        return alone("its file does not say of which class it is")
    if kind not in DICTIONARIES:
        return alone(f"dictionary_learning class {kind!r} is not known here")
    linear = "encoder.weight" in weights  # of nn.Linear, which has matrices the other way round
    W_dec = weights.decoder("decoder.weight", transposed=True) if linear else weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    W_enc_rows = weights.fitting("encoder.weight", d_sae, d_in) if linear else weights.fitting("W_enc", d_in, d_sae).T
    bias = {"GatedAutoEncoder": "gate_bias", "JumpReluAutoEncoder": "b_enc"}.get(kind, "encoder.bias" if linear else "b_enc")
    sae = Parameters(W_enc_rows, weights.bias(bias, d_sae), W_dec, weights.fitting(DICTIONARIES[kind], d_in))
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        # Their encoders do not subtract the decoder's bias (the second's may be told to, which its file does not say).
        sae = sae._replace(b_enc=sae.b_enc + W_enc_rows @ sae.b_dec)
    if kind == "GatedAutoEncoder":
        gates = weights.fitting("r_mag", d_sae), weights.bias("mag_bias", d_sae)
        return Loaded("gated", None, GatedParameters(*sae, *gates), about=about)
    if kind == "JumpReluAutoEncoder":
        return Loaded("jumprelu", None, with_thresholds(sae, weights.thresholds("threshold", d_sae)), about=about)
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        k = weights.k(d_sae) if "k" in weights else config.k(d_sae)  # older files have no buffers
        if kind == "AutoEncoderTopK":
            return Loaded("topk", k, sae, about=about)
        if "threshold" not in weights:
            return alone("its file has no threshold, and without one what fires depends on the batch")
        return Loaded("batchtopk", k, with_one_threshold(sae, weights.number("threshold")), about=about)
    return Loaded("relu", None, sae, about=about)


def _site(config: Config) -> str | None:
    """Which activations it is of, as far as the file says."""
    layer = config.fields.get("layer")
    told = config.hint("submodule_name")
    return told if told is not None or not isinstance(layer, int) else f"layer {layer}"
