"""Matryoshka SAEs: nested dictionaries, each of which must reconstruct alone (Bussmann et al., arXiv:2503.17547, eq. 4).

    z = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)),
    loss = sum over m in M of |x - x_hat_m|^2,   x_hat_m = W_dec[:m] z[:m] + b_dec,

where M holds the sizes of the nested dictionaries, d_sae the last of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes import sparse
from sae_stability.saes.batchtopk import BatchTopK, BatchTopKParameters
from sae_stability.saes.sparse import Codes
from sae_stability.saes.variant import backpropagate

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the features, in the nested dictionaries


def sizes(d_sae: int) -> list[int]:
    """How many features each nested dictionary has."""
    return sorted({max(1, round(d_sae * share)) for share in SHARES})


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    def gradients(
        self, sae: BatchTopKParameters, gradient: BatchTopKParameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        centred = x - sae.b_dec
        codes = sparse.top_of_batch(sae, centred, self.k, self.dtype)
        nested = sizes(len(sae.b_enc))
        parts = _split(codes, nested)
        # In turn what a dictionary adds, the error of its reconstruction, and the sum of the errors in which what it adds takes
        # part: its own and those of all larger ones.
        upstream = parts.decode(sae.W_dec).view(len(x), len(nested), -1)
        upstream[:, 0] -= centred
        for level in range(1, len(nested)):
            upstream[:, level] += upstream[:, level - 1]
        error = upstream[:, -1].clone()
        for level in reversed(range(len(nested) - 1)):
            upstream[:, level] += upstream[:, level + 1]
        upstream *= 2 / len(x)
        rows = upstream.flatten(0, 1)
        gradient.threshold.zero_()
        backpropagate(sae, gradient, parts, centred, rows, parts.into(rows, sae.W_dec), upstream[:, 0].sum(0))
        return error, codes


def _split(codes: Codes, nested: list[int]) -> Codes:
    """Each token's firings in one row a dictionary: those that the next smaller one lacks. Features rise within a token."""
    d_sae, tokens = nested[-1], len(codes.starts) - 1
    device = codes.starts.device
    ends = torch.arange(tokens, device=device)[:, None] * d_sae + torch.tensor(nested, device=device)
    place: Tensor = torch.searchsorted(codes.rows() * d_sae + codes.features, ends.flatten())
    return codes._replace(starts=torch.cat([codes.starts[:1], place]))
