"""TopK SAEs: the k largest pre-activations fire (Gao et al., arXiv:2406.04093).

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec z + b_dec,
    loss = |x - x_hat|^2 + 1/32 |e - e_hat|^2,   e = x - x_hat,

where e_hat is what the k_aux strongest *dead* features make of the error (AuxK). The gradient is written out: only the
encoder product touches every feature, everything behind it costs k features a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.saes import Codes, Parameters

AUX_COEFFICIENT = 1 / 32


@dataclass(frozen=True)
class TopK:
    k: int

    def initialise(self, d_in: int, d_sae: int, generator: torch.Generator) -> Parameters:
        """Random unit directions; the encoder starts as the decoder's transpose (tied start)."""
        W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        return Parameters(W_enc_rows=W_dec.clone(), b_enc=torch.zeros(d_sae), W_dec=W_dec, b_dec=torch.zeros(d_in))

    def encode(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Codes:
        return self._top(self._pre_activations(sae, x))

    def gradients(
        self, sae: Parameters, gradient: Parameters, x: Float[Tensor, "token d_in"], dead: Bool[Tensor, "d_sae"]
    ) -> tuple[Float[Tensor, ""], Codes]:
        """Write the gradient of the loss, a mean over tokens, into `gradient`; return the mean of |x - x_hat|^2 and the codes."""
        pre = self._pre_activations(sae, x)
        codes = self._top(pre)
        error = codes.decode(sae) - x
        upstream = error * (2 / len(x))
        into_codes = codes.into_codes(upstream, sae.W_dec) * (codes.values > 0)

        token, feature_starts, order = codes.by_feature(len(sae.W_dec))
        gradient.W_dec.copy_(_sum_rows(token, feature_starts, codes.values.flatten()[order], upstream))
        gradient.W_enc_rows.copy_(_sum_rows(token, feature_starts, into_codes.flatten()[order], x - sae.b_dec))
        gradient.b_enc.zero_().index_add_(0, codes.indices.flatten(), into_codes.flatten())
        gradient.b_dec.copy_(upstream.sum(0) - gradient.b_enc @ sae.W_enc_rows)
        if dead.any():
            self._revive(sae, gradient, x, pre, error, dead)
        return error.square().sum(1).mean(), codes

    def _pre_activations(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        return torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc_rows.T)

    def _top(self, pre: Float[Tensor, "token d_sae"]) -> Codes:
        values, indices = torch.topk(pre, self.k, dim=1, sorted=False)
        return Codes(values.relu(), indices)

    def _revive(self, sae: Parameters, gradient: Parameters, x, pre, error, dead: Bool[Tensor, "d_sae"]) -> None:
        """Add AuxK's gradient: the dead features learn to explain the error (held fixed)."""
        features = dead.nonzero().squeeze(1)
        k_aux = min(len(features), x.shape[1] // 2)
        values, chosen = torch.topk(pre.index_select(1, features).relu(), k_aux, dim=1, sorted=False)
        z = torch.zeros(len(x), len(features)).scatter_(1, chosen, values)
        W_dec = sae.W_dec.index_select(0, features)
        upstream = (z @ W_dec + error) * (2 * AUX_COEFFICIENT / len(x))
        into_codes = (upstream @ W_dec.T) * (z > 0)
        gradient.W_dec.index_add_(0, features, z.T @ upstream)
        gradient.W_enc_rows.index_add_(0, features, into_codes.T @ (x - sae.b_dec))
        gradient.b_enc.index_add_(0, features, into_codes.sum(0))


def _sum_rows(
    token: Int[Tensor, "firing"],
    starts: Int[Tensor, "d_sae"],
    weight: Float[Tensor, "firing"],
    rows: Float[Tensor, "token d_in"],
) -> Float[Tensor, "d_sae d_in"]:
    """For each feature, the weighted sum of the rows of the tokens on which it fires: a sparse transposed product."""
    return F.embedding_bag(token, rows, starts, per_sample_weights=weight, mode="sum")
