"""What a reader should see of a model's activations before an SAE does: how long they are, and whether a few of them are all
there is.

Language models write activations that are tens or hundreds of times as long as the usual ones on a few tokens, BOS and delimiters
mostly (Sun et al., Massive activations in large language models, arXiv:2402.17762). They make the first principal axis, the scale
of an SAE and its explained variance, so they are counted here, and can be left out.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.language.activations import Activations

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
AXES = 10  # principal axes whose share of the variance is told


@dataclass(frozen=True)
class Norms:
    """How long activations are, as multiples of their median norm, and what the longest do to the principal axes."""

    median: float
    """Of the norms of all tokens, in the model's units."""
    quantiles: pd.DataFrame
    """One row for each position in the context, and one, at position -1, for all tokens. Columns: position, tokens, and `q0.01` to
    `q1`, the quantiles of the norm as multiples of `median`; between two norms they are interpolated."""
    outliers: pd.DataFrame
    """One row for each token longer than `cutoff` medians, longest first. Columns: row (of the activations), position, token,
    norm."""
    outlier_share: float
    """Of the tokens."""
    variance: Float[np.ndarray, "axis"]
    """The share of the variance along each of the first `AXES` principal axes."""
    variance_without: Float[np.ndarray, "axis"]
    """The same of the tokens that are no outliers."""


def describe(
    x: Float[Tensor, "token d_in"], position: Int[np.ndarray, "token"], token: Int[np.ndarray, "token"], cutoff: float
) -> Norms:
    """Describe activations `x` of tokens with the ids `token` at the places `position` of their contexts.

    Raises `UserError` for a cutoff below 1.
    """
    norms = _norms(x)
    if not cutoff >= 1:
        raise UserError(f"cutoff: {cutoff:g} would leave out tokens of the usual length; give 1 or more")
    median = float(np.median(norms))
    usual = torch.from_numpy(norms <= cutoff * median)
    relative = pd.DataFrame({"position": position, "token": token, "norm": norms / median})
    outliers = relative[~usual.numpy()].sort_values("norm", ascending=False, kind="stable")
    return Norms(
        median,
        pd.DataFrame([_quantiles(-1, relative), *(_quantiles(place, part) for place, part in relative.groupby("position"))]),
        outliers.rename_axis("row").reset_index(),
        len(outliers) / len(relative),
        _shares_of_variance(x),
        _shares_of_variance(x[usual]),
    )


def _norms(x: Float[Tensor, "token d_in"]) -> Float[np.ndarray, "token"]:
    return np.concatenate([part.float().norm(dim=1).numpy() for part in x.split(1 << 14)])


def _quantiles(place: int, part: pd.DataFrame) -> dict:
    return {"position": place, "tokens": len(part)} | {f"q{share:g}": float(part["norm"].quantile(share)) for share in QUANTILES}


def _shares_of_variance(x: Float[Tensor, "token d_in"]) -> Float[np.ndarray, "axis"]:
    with threads.single():
        variances = torch.linalg.eigvalsh(Activations.of(x).covariance.double()).flip(0).clamp_min(0)
    return (variances / variances.sum()).numpy()[:AXES]
