"""What several test files draw: directions, and ensembles with nothing left at its starting value."""

import torch
import torch.nn.functional as F

from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ensemble(name: str, d_in: int, d_sae: int, k: int, mean: torch.Tensor, scale: float, seeds: int = 2) -> Ensemble:
    """Untrained SAEs of a variant, every weight of which was moved, under a normalisation far from the identity."""
    method, generator = variant(name)(k), torch.Generator().manual_seed(0)
    saes = [method.initialise(d_in, d_sae, generator) for _ in range(seeds)]
    stacked = (torch.stack(tensors) for tensors in zip(*saes, strict=True))
    moved = method.parameters(*(tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for tensor in stacked))
    moved = moved._replace(W_dec=F.normalize(moved.W_dec, dim=2))
    if hasattr(moved, "threshold"):
        moved = moved._replace(threshold=moved.threshold.abs() + 0.4)
    return Ensemble(name, k, list(range(seeds)), moved, mean=mean, scale=scale)
