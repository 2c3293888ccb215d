"""Trains all seeds of a recipe together: `loop.py` takes the steps, `shards.py` makes ensembles of them, `steering.py` finds the
penalty of variants that have one. `together.py` takes the steps of SAEs that are small in fewer calls.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.language.activations import Activations, Blocks
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.study import Recipe
from sae_stability.training.loop import SNAPSHOTS, encoder_dtype
from sae_stability.training.shards import CHECKPOINT_SECONDS, CURVE, DIVERGED, ENSEMBLE, Job, train_all
from sae_stability.training.steering import sparser_and_denser, steer

__all__ = [
    "CURVE",
    "DIVERGED",
    "ENSEMBLE",
    "SNAPSHOTS",
    "Job",
    "encoder_dtype",
    "prepare",
    "sparser_and_denser",
    "steer",
    "train",
    "train_all",
]


def train(
    recipe: Recipe,
    activations: Activations | Float[Tensor, "token d_in"] | np.ndarray,
    seeds: Sequence[int],
    folder: Path | None = None,
    described: str = "training",
    device: str = "cpu",
    at_once: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Ensemble:
    """Train one SAE of `recipe` for each of `seeds` on `activations`; the ensemble lacks seeds that diverged.

    A variant with a sparsity penalty is steered to L0 = k first, unless the recipe names the coefficient. With a `folder`, the
    run can be killed at any moment and resumes to the same bits. Adam's rate rises linearly, stays, and falls linearly to zero.

    Raises `UserError` where there are fewer activations than the recipe's tokens, for such as nothing can be trained on, or where
    every seed diverges.
    """
    if isinstance(activations, Tensor | np.ndarray):
        activations = Activations.of(_checked(activations))
    job = prepare(recipe, activations, seeds, folder, device)
    (ensemble,) = train_all([job], described, torch.device(device), at_once, checkpoint_seconds)
    if not ensemble.seeds:
        raise UserError(f"rate: every seed of {recipe.label} diverged; lower rate")
    return ensemble


def _checked(activations: Tensor | np.ndarray) -> Float[Tensor, "token d_in"]:
    """Activations from anywhere. Raises `UserError` for those of another shape, not finite, or all the same."""
    x = torch.from_numpy(np.ascontiguousarray(activations)) if isinstance(activations, np.ndarray) else activations.detach().cpu()
    if x.ndim != 2:
        raise UserError(f"activations: their shape is {list(x.shape)} and should be [token, d_in]; flatten batches and positions")
    if not x.isfinite().all():
        raise UserError("activations: they hold NaN or infinite values; leave those tokens out")
    if len(x) and (x == x[0]).all():
        raise UserError("activations: all tokens are the same; there is nothing to learn")
    return x


def prepare(recipe: Recipe, blocks: Blocks, seeds: Sequence[int], folder: Path | None = None, device: str = "cpu") -> Job:
    """The job that trains one SAE of `recipe` for each of `seeds`, its penalty steered to L0 = k where there is one to steer.

    Raises `UserError` where there are fewer activations than the recipe's tokens, or no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: PyTorch finds no CUDA device; set device to cpu")
    if len(blocks) < recipe.tokens:
        raise UserError(f"tokens: {recipe.tokens:,} wanted and {len(blocks):,} there; lower tokens (and raise passes)")
    coefficient = recipe.coefficient or 0.0
    if variant(recipe.variant).steered and recipe.coefficient is None:
        coefficient = steer(recipe, blocks, folder and folder / "pilots", torch.device(device))
    return Job(recipe, blocks.first(recipe.tokens), list(seeds), folder, [coefficient] * len(seeds))
