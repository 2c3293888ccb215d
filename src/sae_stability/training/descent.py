"""One step of Adam for the weights of an SAE, whose directions may have to stay at unit length."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sparse import kernels


def descend(optimizer: torch.optim.Adam, sae: Parameters, gradient: Parameters, unit_decoder: bool, clip: float | None) -> None:
    """Take the step, in place. `gradient` is scaled down to norm `clip` where there is one, and is no more what it was."""
    for parameter, its in zip(sae, gradient, strict=True):
        parameter.grad = its
    unit_step = getattr(kernels(sae.W_dec), "unit_step", None)
    if unit_decoder and clip is None and unit_step is not None:
        group, state = optimizer.param_groups[0], _state(optimizer, sae.W_dec)
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        step = state["step"] if sae.W_dec.is_cuda else state["step"].item()
        unit_step(sae.W_dec, gradient.W_dec, moments, group["lr"], step, group["betas"], group["eps"])
        sae.W_dec.grad = None  # which the optimizer then passes over
        optimizer.step()
        return
    if unit_decoder:
        # A direction has no length to learn: the gradient along it would only fight the normalisation below.
        gradient.W_dec.addcmul_(sae.W_dec, torch.linalg.vecdot(gradient.W_dec, sae.W_dec)[..., None], value=-1)
    if clip is not None:
        _clip(gradient, clip)
    optimizer.step()
    if unit_decoder:
        F.normalize(sae.W_dec, dim=-1, out=sae.W_dec)


def _state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """What Adam keeps of a parameter, from its first step on."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


def _clip(gradient: Parameters, most: float) -> None:
    """Scale the gradient of one seed down to norm `most`."""
    rows = [part.reshape(len(part) if part.dim() else 1, -1) for part in gradient]
    norm = torch.stack([total(torch.linalg.vecdot(part, part)) for part in rows]).sum().sqrt()
    torch._foreach_mul_(list(gradient), (most / norm).clamp(max=1.0))


def total(values: Float[Tensor, "row"]) -> Float[Tensor, ""]:
    """A sum in float64. On a CPU it is NumPy's, which takes one thread: the bits of PyTorch's depend on their number."""
    if values.device.type == "cpu":
        return torch.as_tensor(values.numpy().sum(dtype=np.float64))
    return values.sum(dtype=torch.float64)
