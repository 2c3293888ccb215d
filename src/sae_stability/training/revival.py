"""AuxK: dead features are revived by learning to explain what the live ones leave (Gao et al., arXiv:2406.04093, A.2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability.saes.parameters import Parameters

AUX_COEFFICIENT = 1 / 32  # weight of the auxiliary loss
TOGETHER = 16  # features: products of another number are rounded differently by several threads than by one


def revive(
    sae: Parameters,
    gradient: Parameters,
    centred: Float[Tensor, "token d_in"],
    error: Float[Tensor, "token d_in"],
    dead: Bool[Tensor, "d_sae"],
    most: int | None = None,
) -> None:
    """Add the gradient of the auxiliary loss |x - x_hat - e_hat|^2 / 32, a mean over tokens, for the weights of `dead` features.

    e_hat is what the d_in / 2 strongest dead features of each token make of `centred` = x - b_dec. `error` is x_hat - x, as a
    variant's `gradients` returns it; the loss holds it fixed and explains what it lacks, x - x_hat.

    b_dec gets none of it, on purpose, although the pre-activations depend on b_dec too and autograd would add a term: b_dec is part
    of the live features' reconstruction, which the auxiliary loss is not to move.

    Where `most` says how many features are dead at most, the same is computed with living ones silent among them, and a device is
    not waited for. Without it there are silent ones too, up to the next multiple of `TOGETHER`, so that a seed that trains alone,
    on all threads, ends with the bits of one in company.
    """
    if most is None:
        features = dead.nonzero().squeeze(1)
        features = torch.cat([features, (~dead).nonzero().squeeze(1)[: -len(features) % TOGETHER]])
    else:
        features = torch.argsort(dead.byte(), descending=True, stable=True)[:most]
    if len(features) == 0:
        return
    k_aux = min(len(features), centred.shape[1] // 2)
    W_dec, W_enc_rows = sae.W_dec.index_select(0, features), sae.W_enc_rows.index_select(0, features)
    pre = torch.addmm(sae.b_enc.index_select(0, features), centred, W_enc_rows.T).relu_()
    pre *= dead[features]
    z = pre
    if k_aux < len(features):
        strongest = torch.topk(pre, k_aux, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter_(1, strongest.indices, strongest.values)
    upstream = (z @ W_dec + error) * (2 * AUX_COEFFICIENT / len(centred))
    into_pre = (upstream @ W_dec.T) * (z > 0)
    gradient.W_dec.index_add_(0, features, z.T @ upstream)
    gradient.W_enc_rows.index_add_(0, features, into_pre.T @ centred)
    gradient.b_enc.index_add_(0, features, into_pre.sum(0))
