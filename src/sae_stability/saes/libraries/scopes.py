"""The SAEs of Gemma Scope (`params.npz`) and of its second edition (`params.safetensors`), and of Llama Scope and OpenMOSS."""

from dataclasses import replace
from pathlib import Path

from sae_stability.errors import UserError
from sae_stability.saes.libraries.common import TRANSCODER, with_thresholds
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import About, Config, Loaded, Weights, directions_only

GEMMA, GEMMA_2 = "params.npz", "params.safetensors"
OPENMOSS = ("checkpoints/final.safetensors", "final.safetensors")
LOWER_CASE = {"w_enc": "W_enc", "w_dec": "W_dec"}  # of the second edition
HYPERPARAMETERS = "hyperparams.json"


def read_gemma(folder: Path) -> Loaded:
    """A JumpReLU SAE whose encoder does not subtract the decoder's bias (Lieberum et al., arXiv:2408.05147).

    Raises `UserError` for transcoders, crosscoders, and files that contradict themselves.
    """
    path = folder / (GEMMA if (folder / GEMMA).is_file() else GEMMA_2)
    weights = Weights.read(path).named(LOWER_CASE)
    config = Config.read(folder / "config.json") if (folder / "config.json").is_file() else Config(path, {})
    written = config.hint("hf_hook_point_out")
    elsewhere = written is not None and written != config.hint("hf_hook_point_in")
    if (config.hint("type") or "sae") != "sae" or elsewhere or weights.any_of(("affine_skip_connection", "W_skip")):
        raise UserError(f"{path}: {TRANSCODER}")
    about = About(folder, config.hint("model_name"), config.hint("hf_hook_point_in"))
    if "threshold" not in weights or "W_enc" not in weights:
        return directions_only(weights.directions(), replace(about, encoder="it has no threshold, so its encoder is not known"))
    W_dec = weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    W_enc_rows, b_dec = weights.fitting("W_enc", d_in, d_sae).T, weights.fitting("b_dec", d_in)
    sae = Parameters(W_enc_rows, weights.bias("b_enc", d_sae) + W_enc_rows @ b_dec, W_dec, b_dec)
    return Loaded("jumprelu", None, with_thresholds(sae, weights.thresholds("threshold", d_sae)), about=about)


def read_openmoss(folder: Path) -> Loaded:
    """Its directions. What fires depends on how activations were normalised, which is not done here."""
    path = next(folder / name for name in OPENMOSS if (folder / name).is_file())
    place = next((up for up in (folder, folder.parent) if (up / HYPERPARAMETERS).is_file()), None)
    config = Config.read(place / HYPERPARAMETERS) if place is not None else Config(path, {})
    written, read_from = config.hint("hook_point_out"), config.hint("hook_point_in")
    if written is not None and written != read_from:
        raise UserError(f"{path}: {TRANSCODER}")
    reason = "SAEs of OpenMOSS normalise activations as they encode, which is not done here"
    return directions_only(Weights.read(path).directions(), About(folder, hook_name=read_from, encoder=reason))
