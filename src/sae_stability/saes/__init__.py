"""Sparse autoencoders: one variant a file behind one small interface (`variant.py`).

A variant works on one seed; `training/` runs it for all seeds of a cell. To add one, write its file and add its name to
`Variants` in `config.py`.
"""

from importlib import import_module

import torch

from sae_stability.saes.variant import Variant


def variant(name: str) -> type[Variant]:
    """The variant that the file `name`.py holds."""
    module = import_module(f"sae_stability.saes.{name}")
    (found,) = (kind for kind in vars(module).values() if isinstance(kind, type) and _is_variant_of(kind, module.__name__))
    return found


def files_of(name: str) -> list[str]:
    """The files that hold a variant and those it builds on, under the package's folder."""
    return sorted({f"saes/{kind.__module__.rpartition('.')[2]}.py" for kind in variant(name).__mro__ if issubclass(kind, Variant)})


def fastest_dtype(device: torch.device) -> torch.dtype:
    """In which encoder products are fastest: bfloat16 where the processor multiplies it, float32 elsewhere."""
    if device.type == "cuda":
        multiplies = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if multiplies else torch.float32


def _is_variant_of(kind: type, module: str) -> bool:
    return issubclass(kind, Variant) and kind.__module__ == module
