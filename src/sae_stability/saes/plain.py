"""The sparse products of an SAE in plain PyTorch, on any device: the reference that `compiled.py` is tested against.

Firings are rows of a sparse matrix: row i holds `features[starts[i]:starts[i + 1]]`, with one value each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class ByFeature(NamedTuple):
    """The same firings, sorted by feature."""

    starts: Int[Tensor, "d_sae+1"]
    """Where each feature's firings start."""
    rows: Int[Tensor, "firing"]
    order: Int[Tensor, "firing"]
    """Each firing's place among those sorted by row."""


def top(pre: Float[Tensor, "token d_sae"], k: int) -> Int[Tensor, "token k"]:
    """The k largest of each row."""
    return torch.topk(pre, k, dim=1, sorted=False).indices


def above(pre: Float[Tensor, "token d_sae"], bound: Float[Tensor, "d_sae"]) -> tuple[Int[Tensor, "token+1"], Int[Tensor, "firing"]]:
    """Where each row exceeds `bound`, which is zero or more: where rows start, and features in rising order."""
    fires = pre > bound.to(pre.dtype)
    return _starts(fires.sum(1)), fires.nonzero()[:, 1]


def dots(
    rows: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], starts: Int[Tensor, "row+1"], features: Int[Tensor, "firing"]
) -> Float[Tensor, "firing"]:
    """For each firing, its row times its feature's direction."""
    row = row_of(starts, len(features))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, W, features, starts[:-1], row, 0)


def combine(
    values: Float[Tensor, "firing"],
    W: Float[Tensor, "d_sae d_in"],
    starts: Int[Tensor, "row+1"],
    features: Int[Tensor, "firing"],
) -> Float[Tensor, "row d_in"]:
    """For each row, the directions of its features weighted by their values."""
    return F.embedding_bag(features, W, starts, per_sample_weights=values, mode="sum", include_last_offset=True)


def transposed(starts: Int[Tensor, "row+1"], features: Int[Tensor, "firing"], d_sae: int) -> ByFeature:
    """Firings sorted by feature, and by row within a feature."""
    found, order = torch.sort(features.int(), stable=True)
    begins = torch.searchsorted(found, torch.arange(d_sae + 1, dtype=torch.int32, device=found.device))
    return ByFeature(begins, row_of(starts, len(features))[order], order)


def sums(
    by_feature: ByFeature, weights: Float[Tensor, "firing"], rows: Float[Tensor, "row d_in"], out: Float[Tensor, "d_sae d_in"]
) -> None:
    """For each feature, the rows on which it fires weighted by `weights`."""
    out.copy_(combine(weights[by_feature.order], rows, by_feature.starts, by_feature.rows))


def totals(by_feature: ByFeature, weights: Float[Tensor, "firing"]) -> Float[Tensor, "d_sae"]:
    """For each feature, the sum of the weights of its firings."""
    # `unsafe` leaves out a check of the offsets, which would wait for a device.
    return torch.segment_reduce(weights[by_feature.order], "sum", offsets=by_feature.starts, initial=0, unsafe=True)


def pursue(
    along: Float[Tensor, "token d_sae"], gram: Float[Tensor, "d_sae d_sae"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Take, k times, the direction along which most of each row's residual lies: which, and how much of it; zero where none does.

    `along` holds the inner product of each residual with each direction, and is kept up to date; `gram` those of directions.
    """
    features = torch.zeros(len(along), k, dtype=torch.int64, device=along.device)
    values = torch.zeros(len(along), k, device=along.device)
    for step in range(k if gram.numel() else 0):
        most, features[:, step] = along.max(1)
        values[:, step] = most.clamp_min(0)
        along.addcmul_(gram[features[:, step]], values[:, step, None], value=-1)
    return features, values


def row_of(starts: Int[Tensor, "row+1"], firings: int) -> Int[Tensor, "firing"]:
    """The row of each firing. With their number known, a device need not be waited for."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff(), output_size=firings)


def _starts(counts: Int[Tensor, "row"]) -> Int[Tensor, "row+1"]:
    return F.pad(counts.cumsum(0), (1, 0))
