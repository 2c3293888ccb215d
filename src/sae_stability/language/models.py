"""Language models through TransformerLens' TransformerBridge: by a name of ours, a Hugging Face folder, a GGUF file, or a hub
id."""

import difflib
import logging
import os
import re
from pathlib import Path

import torch

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.language import fetching

OURS = dict.fromkeys(places.MODELS, "train-model") | dict.fromkeys(places.FETCHED, "fetch-model")
"""Names of ours, which mean a folder in models/, and the command that makes it."""
BLOCK = re.compile(r"\.\d+\.")
BUFFERS = (".bias", "masked_bias", "inv_freq")
"""How the names of what older releases saved beside the weights end: masks, which look like a bias, and rotations."""
LONGEST_CONTEXT = 256  # tokens; longer contexts cost more than they tell about features

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files of which one holds a tokenizer, by the libraries that write them."""


def locate(name: str) -> str:
    """The folder or hub id behind a model's name; a GGUF file is converted into a folder when it is first met.

    Raises `UserError` for a folder or file that can't be a model.
    """
    ours = name in OURS
    folder = places.model(name) if ours else Path(name).expanduser()
    if not ours and folder.suffix == ".gguf" and folder.is_file():
        return str(fetching.converted(folder))
    if not ours and not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.suffix == ".gguf":
            kind = "file" if folder.suffix == ".gguf" else "folder"
            raise UserError(
                f"model: there is no {kind} {name}; give a Hugging Face folder, a .gguf file, a hub id or one of {', '.join(OURS)}"
            )
        shipped = difflib.get_close_matches(name.rpartition("/")[2], OURS, n=1, cutoff=0.8)
        if shipped and ("/" not in name or name.startswith("models/")):
            raise UserError(f"model: there is no {name}; did you mean {shipped[0]}?")
        return name
    if not (folder / "config.json").is_file():
        mend = f"run sae-stability {OURS[name]} {name}" if ours else "give a folder saved with save_pretrained"
        raise UserError(f"model: {folder} holds no config.json; {mend}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(f"model: {folder} holds no tokenizer; save one there with tokenizer.save_pretrained")
    return str(folder)


def load(name: str, randomised: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Boot the model called `name` as a TransformerBridge, in evaluation mode; nothing is unpickled or run from it.

    With `randomised`, the entries of each weight are shuffled: what such a model computes has the scale of the model's weights and
    nothing of what it learnt.

    `dtype` is float32 or bfloat16. bfloat16 is two to four times as fast on GPUs and on CPUs that multiply it: with AVX512-BF16
    (Intel from Cooper Lake on, AMD from Zen 4 on) or AMX (Intel from Sapphire Rapids on). Others emulate it, and are faster in
    float32.

    Raises `UserError` in one line where it can't be booted.
    """
    where = locate(name)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: PyTorch sees no GPU for {device}; set device to cpu, or install a build of PyTorch for your GPU")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    from transformer_lens.model_bridge import TransformerBridge  # ten seconds of imports

    try:
        weights = load_weights(name, dtype)
        if randomised:
            shuffle_weights(weights)
        bridge = TransformerBridge.boot_transformers(
            where, hf_model=weights.to(torch.device(device)), tokenizer=load_tokenizer(name), dtype=dtype, device=device
        )
    except UserError:
        raise
    except Exception as error:
        raise _not_loaded(name, error) from None
    if bridge.tokenizer is None or len(bridge.tokenizer) == 0:
        raise UserError(f"model: {name} comes without a tokenizer; save one beside it with tokenizer.save_pretrained")
    bridge.eval()
    return bridge


def load_weights(name: str, dtype: torch.dtype):
    """The model called `name` as Transformers has it; nothing is unpickled or run from it.

    Raises `UserError` in one line where it can't be loaded, or its weights are of another model.
    """
    from transformers import AutoModelForCausalLM

    where = locate(name)
    try:
        weights, told = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told, and refused below
        )
    except Exception as error:
        raise _not_loaded(name, error) from None
    _check_weights(name, told)
    return weights


def _not_loaded(name: str, error: Exception) -> UserError:
    """The hub, Transformers and TransformerLens each raise their own kinds."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"model: {name} can't be loaded: {reason}")


def _check_weights(name: str, told: dict) -> None:
    """Raise `UserError` where a model's files are of another model than its configuration.

    What they lack Transformers draws at random, and blocks that it does not name are those of a deeper model. What else stands
    beside the weights, such as buffers of older releases or the head of another task, plays no part in what is computed.
    """
    missing, mismatched = (_names(told.get(kind)) for kind in ("missing_keys", "mismatched_keys"))
    blocks = [key for key in _names(told.get("unexpected_keys")) if BLOCK.search(key) and not key.endswith(BUFFERS)]
    for keys, what in ((missing, "lack"), (mismatched, "have in another shape"), (blocks, "have more than")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"model: the weights of {name} {what} what its config.json asks for: {keys[0]}{more}; get both of one "
                "model, or save it again with save_pretrained"
            )


def _names(keys) -> list[str]:
    return sorted(key if isinstance(key, str) else key[0] for key in keys or ())


@torch.no_grad()
def shuffle_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Shuffle the entries of each parameter in place. Weights that are tied stay tied."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter))


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # documents are packed
    return tokenizer


def device_of(bridge) -> torch.device:
    """Where the model computes, and so where the tokens that it reads have to be."""
    return next(bridge.parameters()).device


def check_hook(bridge, hook_name: str) -> None:
    """Raise `UserError` where the model has no such hook point: TransformerLens 3.9 would ignore it in silence."""
    if hook_name not in bridge.hook_dict:
        close = difflib.get_close_matches(hook_name, list(bridge.hook_dict), n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"hook_name: the model has no {hook_name}{hint}; it has {bridge.cfg.n_layers} layers, counted from 0")


def context_length(bridge, wanted: int | None) -> int:
    """Tokens in a context: `wanted`, or what the model takes up to `LONGEST_CONTEXT`. Raises `UserError` beyond the model's."""
    longest = bridge.cfg.n_ctx
    if wanted is not None and wanted > longest:
        raise UserError(f"context: the model reads {longest} tokens at a time; set context to {longest} or less")
    return wanted or min(longest, LONGEST_CONTEXT)
