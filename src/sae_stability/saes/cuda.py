"""The sparse products of `plain.py` as Triton kernels for a CUDA device: same functions, same results up to rounding.

Nothing here but `above`, whose result has as many firings as there are, waits for the device, and nothing adds atomically: equal
inputs give equal bits.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability.saes.plain import ByFeature, above, totals, transposed

__all__ = ["above", "combine", "dots", "pursue", "sums", "top", "totals", "transposed", "unit_step"]

LANES = 1024  # a row is read in so many interleaved lanes
MOST = 8192  # keys that a program can hold at a time
KEYS = {torch.float32: (torch.int32, 31), torch.bfloat16: (torch.int16, 15)}  # integers of the same bits, without the sign's
COLUMNS = 256  # of a direction that a program works on at a time
FIRINGS = 16  # whose directions it fetches at a time


def top(pre: Float[Tensor, "token d_sae"], k: int) -> Int[Tensor, "token k"]:
    """The k largest of each row; where fewer are positive, some feature of value zero or less fills the places."""
    tokens, d_sae = pre.shape
    features = torch.empty(tokens, k, dtype=torch.int64, device=pre.device)
    if not 0 <= k <= d_sae:
        raise ValueError(f"k: {k} of {d_sae} features can't be the largest")
    if features.numel():
        dtype, bits = KEYS[pre.dtype]
        few, depth = triton.next_power_of_2(2 * k), triton.next_power_of_2(triton.cdiv(d_sae, LANES))
        looks_at_few = few * depth <= MOST
        if not looks_at_few:
            few, depth = 1, 1  # nothing is held, but what would be is compiled
        lanes = torch.empty(tokens, few, dtype=torch.int32, device=pre.device)
        sizes = {"LANES": LANES, "BITS": bits, "FEW": few, "DEPTH": depth, "LOOKS_AT_FEW": looks_at_few}
        _top[(tokens,)](pre.contiguous().view(dtype), lanes, features, d_sae, k, **sizes, num_warps=8)
    return features


def dots(
    rows: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], starts: Int[Tensor, "row+1"], features: Int[Tensor, "firing"]
) -> Float[Tensor, "firing"]:
    """For each firing, its row times its feature's direction."""
    out = torch.empty(len(features), device=rows.device)
    if len(rows):
        _dots[(len(rows),)](rows.contiguous(), W, starts, features, out, rows.shape[1], COLUMNS=COLUMNS, FIRINGS=FIRINGS)
    return out


def combine(
    values: Float[Tensor, "firing"],
    W: Float[Tensor, "d_sae d_in"],
    starts: Int[Tensor, "row+1"],
    features: Int[Tensor, "firing"],
) -> Float[Tensor, "row d_in"]:
    """For each row, the directions of its features weighted by their values."""
    out = torch.empty(len(starts) - 1, W.shape[1], device=W.device)
    _weighted_rows_into(out, values, W, starts, features)
    return out


def sums(
    by_feature: ByFeature, weights: Float[Tensor, "firing"], rows: Float[Tensor, "row d_in"], out: Float[Tensor, "d_sae d_in"]
) -> None:
    """For each feature, the rows on which it fires weighted by `weights`."""
    _weighted_rows_into(out, weights[by_feature.order], rows.contiguous(), by_feature.starts, by_feature.rows)


def unit_step(
    W: Float[Tensor, "d_sae d_in"],
    gradient: Float[Tensor, "d_sae d_in"],
    moments: tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"]],
    rate: Float[Tensor, ""],
    step: Float[Tensor, ""],
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Adam's step number `step`, counted from 1, for directions that stay at unit length, in place.

    A direction has no length to learn: the gradient along it is left out, and what it grew is taken back.
    """
    block = triton.next_power_of_2(W.shape[1])
    logs = (math.log(betas[0]), math.log(betas[1]))
    _unit_step[(len(W),)](
        W, gradient, *moments, rate, step, W.shape[1], *betas, *logs, epsilon, BLOCK=block, num_warps=max(1, min(16, block // 256))
    )  # fmt: skip


def pursue(
    along: Float[Tensor, "token d_sae"], gram: Float[Tensor, "d_sae d_sae"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Take, k times, the direction along which most of each row's residual lies: which, and how much of it; zero where none does.

    `along` holds the inner product of each residual with each direction; `gram` those of directions. A program holds a row.
    """
    features = torch.zeros(len(along), k, dtype=torch.int64, device=along.device)
    values = torch.zeros(len(along), k, device=along.device)
    if features.numel() and gram.numel():
        block = triton.next_power_of_2(along.shape[1])
        warps = max(1, min(16, block // 256))
        _pursue[(len(along),)](along.contiguous(), gram, features, values, along.shape[1], k, BLOCK=block, num_warps=warps)
    return features, values


def _weighted_rows_into(out: Tensor, weights: Tensor, rows: Tensor, starts: Tensor, chosen: Tensor) -> None:
    if len(out):
        grid = (len(out), triton.cdiv(out.shape[1], COLUMNS))
        _weighted_rows[grid](weights, rows, starts, chosen, out, out.shape[1], COLUMNS=COLUMNS, FIRINGS=FIRINGS)


# Positive floats grow with their bits, so the k-th largest of some is found by halving the range of integers. As in `compiled.py`,
# k lanes have their largest key at or above `floor`: the k largest keys are in the few lanes that reach it.
@triton.jit
def _top(
    keys,
    lanes,
    features,
    d_sae,
    k,
    LANES: tl.constexpr,
    BITS: tl.constexpr,
    FEW: tl.constexpr,
    DEPTH: tl.constexpr,
    LOOKS_AT_FEW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keys += row * d_sae
    lanes += row * FEW
    features += row * k
    lane = tl.arange(0, LANES)
    count = FEW + 1  # too many, until they are known to be few
    if LOOKS_AT_FEW:
        largest = tl.zeros([LANES], tl.int32)
        for first in range(0, d_sae, LANES):
            key = tl.load(keys + first + lane, mask=first + lane < d_sae, other=0).to(tl.int32)
            largest = tl.maximum(largest, key)
        floor = _kth(largest, k, BITS)
        if floor > 0:
            reaches = (largest >= floor).to(tl.int32)
            place = tl.cumsum(reaches, 0) - 1
            tl.store(lanes + place, lane, mask=(reaches == 1) & (place < FEW))
            count = tl.sum(reaches, 0)
    tl.debug_barrier()  # what other threads of this program stored is read below
    if count <= FEW:
        place = tl.arange(0, FEW)
        chosen = tl.load(lanes + place, mask=place < count, other=0)
        column = tl.arange(0, DEPTH)[:, None] * LANES + chosen[None, :]
        key = tl.load(keys + column, mask=(column < d_sae) & (place < count)[None, :], other=0).to(tl.int32)
        key, column = tl.reshape(key, [DEPTH * FEW]), tl.reshape(column, [DEPTH * FEW])
        least = _kth(key, k, BITS)
        larger = (key > least).to(tl.int32)
        counts = tl.cumsum(larger + ((key == least).to(tl.int32) << 16), 0)  # of larger and of equal keys, in one number
        place = tl.where(larger == 1, counts & 0xFFFF, tl.sum(larger, 0) + (counts >> 16)) - 1
        tl.store(features + place, column.to(tl.int64), mask=(key >= least) & (place < k))
    else:  # too few are positive, or many are equal: look at every key, once a bit
        least = 0
        for bit in range(BITS):
            middle = least + (1 << (BITS - 1 - bit))
            reaches = tl.zeros([LANES], tl.int32)
            for first in range(0, d_sae, LANES):
                key = tl.load(keys + first + lane, mask=first + lane < d_sae, other=0).to(tl.int32)
                reaches += (key >= middle).to(tl.int32)
            least = tl.where(tl.sum(reaches, 0) >= k, middle, least)
        above = tl.zeros([LANES], tl.int32)
        for first in range(0, d_sae, LANES):
            key = tl.load(keys + first + lane, mask=first + lane < d_sae, other=0).to(tl.int32)
            above += (key > least).to(tl.int32)
        before, ties = 0, tl.sum(above, 0)
        for first in range(0, d_sae, LANES):
            inside = first + lane < d_sae
            key = tl.maximum(tl.load(keys + first + lane, mask=inside, other=0).to(tl.int32), 0)
            larger, equal = (key > least).to(tl.int32), ((key == least) & inside).to(tl.int32)
            place = tl.where(larger == 1, before + tl.cumsum(larger, 0), ties + tl.cumsum(equal, 0)) - 1
            tl.store(features + place, (first + lane).to(tl.int64), mask=(larger + equal == 1) & (place < k))
            before += tl.sum(larger, 0)
            ties += tl.sum(equal, 0)


# The largest integer that k keys reach; zero where fewer are positive.
@triton.jit
def _kth(keys, k, BITS: tl.constexpr):
    least = 0
    for bit in range(BITS):
        middle = least + (1 << (BITS - 1 - bit))
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        least = tl.where(reached >= k, middle, least)
    return least


@triton.jit
def _dots(rows, W, starts, features, out, d_in, COLUMNS: tl.constexpr, FIRINGS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    stop = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), stop, FIRINGS):
        firing = start + tl.arange(0, FIRINGS)
        there = firing < stop
        direction = tl.load(features + firing, mask=there, other=0) * d_in
        total = tl.zeros([FIRINGS], tl.float32)
        for first in range(0, d_in, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = column < d_in
            x = tl.load(rows + row * d_in + column, mask=inside, other=0.0)
            tile = tl.load(W + direction[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            total += tl.sum(tile * x[None, :], 1)
        tl.store(out + firing, total, mask=there)


# out[i] = sum of weights[p] * rows[chosen[p]] over p in [starts[i], starts[i + 1]).
@triton.jit
def _weighted_rows(weights, rows, starts, chosen, out, d_in, COLUMNS: tl.constexpr, FIRINGS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d_in
    total = tl.zeros([COLUMNS], tl.float32)
    stop = tl.load(starts + i + 1)
    for start in range(tl.load(starts + i), stop, FIRINGS):
        firing = start + tl.arange(0, FIRINGS)
        there = firing < stop
        weight = tl.load(weights + firing, mask=there, other=0.0)
        row = tl.load(chosen + firing, mask=there, other=0) * d_in
        tile = tl.load(rows + row[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(weight[:, None] * tile, 0)
    tl.store(out + i * d_in + column, total, mask=inside)


@triton.jit
def _unit_step(
    W,
    gradient,
    first_moments,
    second_moments,
    rate,
    step,
    d_in,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG1: tl.constexpr,
    LOG2: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    at = tl.program_id(0).to(tl.int64) * d_in + column
    w = tl.load(W + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    m = tl.load(first_moments + at, mask=inside, other=0.0)
    v = tl.load(second_moments + at, mask=inside, other=0.0)
    g -= tl.sum(g * w, 0) * w
    m += (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    t = tl.load(step).to(tl.float64)
    bias1, bias2 = (1 - tl.exp(t * LOG1)).to(tl.float32), (1 - tl.exp(t * LOG2)).to(tl.float32)
    w -= tl.load(rate) / bias1 * m / (tl.sqrt(v) / tl.sqrt(bias2) + EPSILON)
    w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12)
    tl.store(W + at, w, mask=inside)
    tl.store(first_moments + at, m, mask=inside)
    tl.store(second_moments + at, v, mask=inside)


@triton.jit
def _pursue(along, gram, features, values, d_sae, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d_sae
    left = tl.load(along + row * d_sae + column, mask=inside, other=0.0)
    for step in range(k):
        most = tl.max(left, 0)
        if most > 0:
            best = tl.min(tl.where(left == most, column, BLOCK), 0)
            tl.store(features + row * k + step, best.to(tl.int64))
            tl.store(values + row * k + step, most)
            left -= most * tl.load(gram + best.to(tl.int64) * d_sae + column, mask=inside, other=0.0)
