"""Sparse autoencoders: one variant a file behind one small interface (`variant.py`).

A variant works on one seed; `training/` runs it for all seeds of a cell. To add one, write its file and add its name to
`Variants` in `config.py`.
"""

import os
from functools import cache
from importlib import import_module

import torch

from sae_stability.saes.variant import Variant


@cache
def variant(name: str) -> type[Variant]:
    """The one variant that the file `name`.py defines. The files of others are not read: a result does not depend on them."""
    module = import_module(f"sae_stability.saes.{name}")
    classes = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Variant))
    (own,) = (kind for kind in classes if kind.__module__ == module.__name__)
    return own


FASTEST = "SAE_STABILITY_FASTEST"
"""Environment variable for the jobs of a study: what is fastest where it was planned, by which its results have their names."""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """In which matrix products are fastest: bfloat16 where the processor multiplies it, float32 elsewhere; of a GPU that is not
    seen here, bfloat16. In a job, what it was where the study was planned."""
    planned = os.environ.get(FASTEST)
    if planned:
        return getattr(torch, planned)
    if device.type == "cuda":
        multiplies = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if multiplies else torch.float32
