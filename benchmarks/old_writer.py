"""Writes SAEs with an old release of a library, and what it encodes and rebuilds.

`python old_writer.py LIBRARY FOLDER`, with the release first on PYTHONPATH. The package's own `__init__`, which imports everything,
is left out, and so is wandb, which the first releases import and which writes no SAE.
"""

import importlib
import json
import logging
import sys
import types
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

D_IN, D_SAE, K = 24, 96, 8
SITE = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "hook_head_index": None, "context_size": 64}
DATA = {"prepend_bos": True, "dataset_path": "text", "dataset_trust_remote_code": False, "dtype": "float32", "device": "cpu"}


def inside(package: str) -> None:
    """Make the modules of a package importable without its `__init__`."""
    spec = PathFinder.find_spec(package)
    bare = types.ModuleType(package)
    bare.__path__, bare.__version__ = list(spec.submodule_search_locations), "old"
    bare.logger = logging.getLogger(package)
    sys.modules[package] = bare


def moved(sae: torch.nn.Module) -> torch.nn.Module:
    """The same with nothing left at its starting value, and with unit directions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if "threshold" in name:
                parameter.copy_(parameter.abs() + 0.5)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def write(folder: Path, save, encode, decode, **facts) -> None:
    x = 3 * torch.randn(400, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(folder)
    with torch.no_grad():
        codes = encode(x)
        save_file({"x": x, "codes": codes.contiguous(), "rebuilt": decode(codes)}, folder / "codes.safetensors")
    (folder / "facts.json").write_text(json.dumps(facts))


def sparsify(out: Path) -> None:
    inside("sparsify")
    coder = importlib.import_module("sparsify.sparse_coder").SparseCoder
    config = importlib.import_module("sparsify.config").SparseCoderConfig
    sae = moved(coder(D_IN, config(num_latents=D_SAE, k=K)))

    def encode(x):
        found = sae.encode(x)
        return torch.zeros(len(x), D_SAE).scatter_(1, found.top_indices, found.top_acts)

    write(out / "topk", sae.save_to_disk, encode, lambda codes: sae.decode(*codes.topk(K)))


def saelens(out: Path) -> None:
    """By the class of the release: `sae_lens.sae.SAE`, or that of training, which the first ones have alone."""
    inside("sae_lens")
    if Path(sys.modules["sae_lens"].__path__[0], "sae.py").exists():
        module = importlib.import_module("sae_lens.sae")
        for name, architecture, more in (
            ("standard", "standard", {}),
            ("bias in the decoder alone", "standard", {"apply_b_dec_to_input": False}),
            ("gated", "gated", {}),
            ("jumprelu", "jumprelu", {}),
            ("topk", "standard", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
            ("scaled after training", "standard", {"finetuning_scaling_factor": True}),
            ("normalised at run time", "standard", {"normalize_activations": "layer_norm"}),
        ):
            given = {"architecture": architecture, "activation_fn_str": "relu", "activation_fn_kwargs": {}} | SITE | DATA
            given |= {"apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "normalize_activations": "none"}
            given |= {"d_in": D_IN, "d_sae": D_SAE, "sae_lens_training_version": "old"} | more
            known = module.SAEConfig.__dataclass_fields__
            if architecture == "standard" or hasattr(module.SAE, f"encode_{architecture}"):
                sae = moved(module.SAE(module.SAEConfig(**{key: value for key, value in given.items() if key in known})))
                encoded = name != "normalised at run time"
                write(out / name, lambda folder, sae=sae: sae.save_model(str(folder)), sae.encode, sae.decode, encoded=encoded)
    else:
        config = importlib.import_module("sae_lens.training.config").LanguageModelSAERunnerConfig
        module = importlib.import_module("sae_lens.training.sparse_autoencoder")
        for name, applied in (("standard", True), ("bias in the decoder alone", False)):
            cfg = config(
                d_in=D_IN, expansion_factor=D_SAE // D_IN, hook_point="blocks.1.hook_resid_pre", hook_point_layer=1,
                apply_b_dec_to_input=applied, dtype="torch.float32", verbose=False, wandb_id="none",
            )  # fmt: skip
            sae = moved(module.SparseAutoencoder(cfg))
            write(out / name, lambda folder, sae=sae: sae.save_model(str(folder)), sae.encode, sae.decode)


if __name__ == "__main__":
    sys.modules["wandb"] = MagicMock(__spec__=ModuleSpec("wandb", None), __path__=[])
    {"sae-lens": saelens, "eai-sparsify": sparsify}[sys.argv[1]](Path(sys.argv[2]))
