"""sparsify of EleutherAI: `sae.safetensors` beside `cfg.json`."""

from dataclasses import replace
from pathlib import Path

from sae_stability.errors import UserError
from sae_stability.saes.libraries.common import TRANSCODER
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import About, Config, Loaded, Weights, directions_only

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


def read(folder: Path) -> Loaded:
    """TopK SAEs; the multi-TopK loss of a training changes nothing of what they compute. Directions alone for other activations.

    Raises `UserError` for transcoders, for signed codes, and for files that contradict themselves.
    """
    config, weights = Config.read(folder / CONFIG), Weights.read(folder / WEIGHTS)
    if config.flag("transcode", False) or config.flag("skip_connection", False):
        raise UserError(f"{config.path}: {TRANSCODER}")
    if config.flag("signed", False):
        raise UserError(
            f"{config.path}: its codes have a sign (signed is true), and its directions match by |cosine|, which this does not do; "
            "give an SAE whose codes are positive"
        )
    about = About(folder, hook_name=config.hint("hookpoint", "hook_name"))
    if "W_dec" not in weights and "decoder.weight" in weights:
        reason = "its tensors have other names than sparsify's, so its encoder is not known"
        return directions_only(weights.directions(), replace(about, encoder=reason))
    W_dec = weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    about = replace(about, sizes=config.differing(d_in=d_in, num_latents=d_sae))
    activation = config.text("activation", "topk")
    if activation != "topk":
        return directions_only(W_dec, replace(about, encoder=f"sparsify activation {activation!r} is not known here"))
    encoder = weights.fitting("encoder.weight", d_sae, d_in), weights.bias("encoder.bias", d_sae)
    return Loaded("topk", config.k(d_sae), Parameters(*encoder, W_dec, weights.fitting("b_dec", d_in)), about=about)
