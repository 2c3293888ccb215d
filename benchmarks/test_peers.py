"""The same weights give the same codes and reconstructions here, in SAELens and in dictionary_learning."""

import math
from inspect import isbuiltin

import pytest
import torch
import torch.nn.functional as F
from peers import VARIANTS, forward, forward_variants

from sae_stability.saes import variant
from sae_stability.study import Variants

D_IN, D_SAE, K = 24, 96, 8
PAIRS = [(library, name) for library in VARIANTS for name in Variants.__args__ if name in forward_variants(library)]


def trained(name: str):
    """Parameters with nothing left at its starting value."""
    generator = torch.Generator().manual_seed(0)
    sae = variant(name)(K).initialise(D_IN, D_SAE, generator)
    sae = type(sae)(*(tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for tensor in sae))
    sae = sae._replace(W_dec=F.normalize(sae.W_dec, dim=1))
    return sae._replace(threshold=sae.threshold.abs() + 0.5) if hasattr(sae, "threshold") else sae


def as_given(sae) -> dict[str, torch.Tensor]:
    given = {**sae._asdict(), "W_enc": sae.W_enc_rows.T.contiguous()}
    del given["W_enc_rows"]
    if "log_threshold" in given:
        given["threshold"] = given.pop("log_threshold").exp()
    return given


def test_no_peer_leaves_math_changed():
    for library in VARIANTS:
        forward(library, "topk", as_given(trained("topk")), torch.zeros(1, D_IN), K)
        assert isbuiltin(math.ceil), library


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_forward_passes_agree(library, name):
    sae, x = trained(name), torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1))
    codes = variant(name)(K).encode(sae, x)
    ours = codes.dense(D_SAE), codes.decode(sae.W_dec) + sae.b_dec
    assert (ours[0] > 0).any()
    for mine, theirs in zip(ours, forward(library, name, as_given(sae), x, K), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
