"""Trains all seeds of a cell together: `loop.py` takes the steps, `shards.py` makes ensembles of them, `steering.py` finds the
penalty of variants that have one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.config import Cell
from sae_stability.errors import UserError
from sae_stability.language.activations import Activations, Blocks
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.training.shards import CHECKPOINT_SECONDS, Job, train_all
from sae_stability.training.steering import sparser_and_denser, steer

__all__ = ["Job", "prepare", "sparser_and_denser", "steer", "train", "train_all"]


def train(
    cell: Cell,
    activations: Activations | Float[Tensor, "token d_in"],
    seeds: Sequence[int],
    folder: Path | None = None,
    described: str = "training",
    device: str = "cpu",
    at_once: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Ensemble:
    """Train one SAE of `cell` for each of `seeds` on `activations`; the ensemble lacks seeds that diverged.

    A variant with a sparsity penalty is steered to L0 = k first, unless the cell names the coefficient. With a `folder`, the
    run can be killed at any moment and resumes to the same bits. Adam's rate rises linearly, stays, and falls linearly to zero.

    Raises `UserError` where there are fewer activations than the cell's tokens, or where every seed diverges.
    """
    if isinstance(activations, Tensor):
        activations = Activations.of(activations)
    job = prepare(cell, activations, seeds, folder, device)
    (ensemble,) = train_all([job], described, torch.device(device), at_once, checkpoint_seconds)
    if not ensemble.seeds:
        raise UserError(f"rate: every seed of {cell.label} diverged; lower rate")
    return ensemble


def prepare(cell: Cell, blocks: Blocks, seeds: Sequence[int], folder: Path | None = None, device: str = "cpu") -> Job:
    """The job that trains one SAE of `cell` for each of `seeds`, its penalty steered to L0 = k where there is one to steer.

    Raises `UserError` where there are fewer activations than the cell's tokens, or no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: PyTorch finds no CUDA device; set device to cpu")
    if len(blocks) < cell.tokens:
        raise UserError(f"tokens: {cell.tokens:,} wanted and {len(blocks):,} there; lower tokens (and raise passes)")
    coefficient = cell.coefficient or 0.0
    if variant(cell.variant).steered and cell.coefficient is None:
        coefficient = steer(cell, blocks, folder and folder / "pilots", torch.device(device))
    return Job(cell, blocks.first(cell.tokens), list(seeds), folder, [coefficient] * len(seeds))
