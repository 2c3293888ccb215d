"""SAELens, from its first releases on: `sae_weights.safetensors` beside `cfg.json`."""

from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.saes.batchtopk import BatchTopKParameters
from sae_stability.saes.gated import GatedParameters
from sae_stability.saes.jumprelu import JumpReLUParameters
from sae_stability.saes.libraries.common import TRANSCODER, with_one_threshold, with_thresholds
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import About, Config, Loaded, Weights, directions_only, scaled_by, shown

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
# Tensors of one purpose: the configuration names the first, and old releases wrote the second.
SCALES = ("finetuning_scaling_factor", "scaling_factor")
NOT_NORMALISED = (None, False, "none")
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk", "matryoshka", "matryoshka_jumprelu")


def read(folder: Path) -> Loaded:
    """Standard, gated, jumprelu, topk and batchtopk SAEs, and Matryoshka ones; those of before there was an `architecture` too.

    Raises `UserError` for transcoders and crosscoders, and for files that contradict themselves. Directions alone where activations
    are normalised at run time, and for other architectures and activation functions.
    """
    if not (folder / CONFIG).exists() and (folder / "config.json").is_file():
        about = About(folder, encoder=f"{CONFIG} is missing, so its encoder is not known")
        return directions_only(Weights.read(folder / WEIGHTS).directions(), about)
    config, weights = Config.read(folder / CONFIG), Weights.read(folder / WEIGHTS)
    architecture = _architecture(config, weights)
    if architecture.endswith("transcoder") or _writes_elsewhere(config):
        raise UserError(f"{config.path}: {TRANSCODER}")
    W_dec = weights.decoder("W_dec")
    d_sae, d_in = W_dec.shape
    about = replace(_about(folder, config), sizes=config.differing(d_in=d_in, d_sae=d_sae))
    scale = _scale(config, weights, d_sae)
    if scale is not None:
        W_dec = W_dec * scale[:, None]
    reason = _not_understood(config, architecture)
    if reason is not None:
        return directions_only(W_dec, replace(about, encoder=reason))

    W_enc_rows, b_dec = weights.fitting("W_enc", d_in, d_sae).T, weights.fitting("b_dec", d_in)
    b_enc = weights.bias("b_gate" if architecture == "gated" else "b_enc", d_sae)
    subtracted = config.flag("apply_b_dec_to_input", True)
    shift = 0 if subtracted else W_enc_rows @ b_dec  # pre = W x + b = W (x - b_dec) + (b + W b_dec)
    sae = Parameters(W_enc_rows, b_enc + shift, W_dec, b_dec)
    if config.flag("rescale_acts_by_decoder_norm", False):
        sae = scaled_by(W_dec.norm(dim=1), sae)
    variant, k, parameters = _variant(architecture, config, weights, sae, shift)
    return Loaded(variant, k, parameters, about=about)


def _scale(config: Config, weights: Weights, d_sae: int) -> Float[Tensor, "d_sae"] | None:
    """What fine-tuning multiplies codes by as they are decoded. The first releases always have it, and say nothing of it.

    Raises `UserError` where the file says that there is none and has one that does something.
    """
    told = config.flag(SCALES[0], False)
    name = next((name for name in SCALES if name in weights), None)
    if name is None:
        return weights.fitting(SCALES[0], d_sae) if told else None  # which says that it is missing
    scale = weights.fitting(name, d_sae)
    if SCALES[0] in config and not told and not bool((scale == 1).all()):
        raise UserError(f"{config.path}: {SCALES[0]} is false, and the weights hold a {name}; correct one of them")
    return scale


def _variant(
    architecture: str, config: Config, weights: Weights, sae: Parameters, shift
) -> tuple[str, int | None, Parameters | GatedParameters | JumpReLUParameters | BatchTopKParameters]:
    d_sae = len(sae.W_dec)
    if architecture == "gated":
        r_mag, b_mag = weights.fitting("r_mag", d_sae), weights.bias("b_mag", d_sae)
        return "gated", None, GatedParameters(*sae, r_mag, b_mag + shift * r_mag.exp())
    if architecture == "topk":
        kwargs = config.within("activation_fn_kwargs")
        return "topk", (config if "k" in config or "k" not in kwargs else kwargs).k(d_sae), sae
    if architecture in ("jumprelu", "matryoshka_jumprelu"):
        if "log_threshold" in weights:  # of older training checkpoints
            return "jumprelu", None, with_thresholds(sae, weights.fitting("log_threshold", d_sae).exp())
        return "jumprelu", None, with_thresholds(sae, weights.thresholds("threshold", d_sae))
    if architecture in ("batchtopk", "matryoshka_batchtopk", "matryoshka"):  # of a training checkpoint
        return "batchtopk", config.average_k(d_sae), with_one_threshold(sae, weights.number("topk_threshold"))
    return "relu", None, sae


def _architecture(config: Config, weights: Weights) -> str:
    """Older files do not say: their tensors do, and their activation function."""
    told = config.text("architecture", "")
    if not told:
        told = "gated" if "r_mag" in weights else "jumprelu" if weights.any_of(("threshold", "log_threshold")) else "standard"
    return "topk" if told == "standard" and _activation(config) == "topk" else told


def _activation(config: Config) -> str:
    return config.text("activation_fn_str", config.text("activation_fn", "relu"))


def _not_understood(config: Config, architecture: str) -> str | None:
    """Why the encoder can't be taken."""
    normalisation = config.fields.get("normalize_activations")
    if normalisation not in NOT_NORMALISED:
        if not isinstance(normalisation, bool | str):
            raise UserError(f"{config.path}: normalize_activations is {shown(normalisation)} and should be a string; correct it")
        return f"activations are normalised at run time ({shown(normalisation)}), which is not done here; fold it in with SAELens"
    if architecture not in ARCHITECTURES:
        return f"SAELens architecture {architecture!r} is not known here"
    if architecture == "standard" and _activation(config) not in ("relu", ""):
        return f"activation function {_activation(config)!r} is not known here"
    return None


def _writes_elsewhere(config: Config) -> bool:
    """Whether the file names another site that its decoder writes to: older transcoders."""
    read_from = config.hint("hook_name", "hook_point")
    told = config.hint("hook_name_out", "hook_point_out", "out_hook_point")
    return config.fields.get("is_transcoder") is True or (told is not None and told != read_from)


def _about(folder: Path, config: Config) -> About:
    """The model and the hook point stood at the top level, and stand among the metadata now."""
    metadata = config.within("metadata")
    kwargs = [place.within("model_from_pretrained_kwargs").fields for place in (config, metadata)]
    return About(
        folder,
        model=config.hint("model_name") or metadata.hint("model_name"),
        hook_name=config.hint("hook_name", "hook_point") or metadata.hint("hook_name", "hook_point"),
        centred=any(each.get("center_writing_weights") is True for each in kwargs),
    )
