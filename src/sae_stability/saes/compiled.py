"""The sparse products of `plain.py` as numba kernels for the CPU: same functions, same results up to rounding.

Pre-activations are compared as integers: the bits of positive floats, in float32 and bfloat16 alike, grow with their value. Every
output row belongs to one thread, so that results do not depend on the number of threads.

Kernels index without bounds checks, so each function looks at its arguments first, and raises `ValueError` where a kernel would
leave its arrays.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange
from torch import Tensor

from sae_stability import threads
from sae_stability.saes.plain import ByFeature

LANES = 128  # a row is scanned in so many interleaved lanes; a vector register holds 16 or 32 of them
FEW = 8  # keys, up to which the largest are kept in order rather than counted
TOGETHER = 32  # directions whose largest product is found together, in registers
REASSOCIATED = {"nsz", "arcp", "contract", "reassoc"}  # sums may be vectorised; NaN and infinity keep their meaning
KEYS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def top(pre: Float[Tensor, "token d_sae"], k: int) -> Int[Tensor, "token k"]:
    """The k largest of each row; where fewer are positive, some feature of value zero or less fills the places."""
    _require(0 <= k <= pre.shape[1], f"k: {k} of {pre.shape[1]} features can't be the largest")
    features = torch.empty(len(pre), k, dtype=torch.int64)
    keys = pre.view(KEYS[pre.dtype]).numpy()
    threads.call(_top, keys, k, np.iinfo(keys.dtype).max, _blocks(), features.numpy())
    return features


def above(pre: Float[Tensor, "token d_sae"], bound: Float[Tensor, "d_sae"]) -> tuple[Int[Tensor, "token+1"], Int[Tensor, "firing"]]:
    """Where each row exceeds `bound`, which is zero or more: where rows start, and features in rising order."""
    _require(bound.shape == pre.shape[1:], f"bound: {list(bound.shape)} does not fit pre-activations {list(pre.shape)}")
    keys = pre.view(KEYS[pre.dtype]).numpy()
    least = bound.to(pre.dtype).view(KEYS[pre.dtype]).numpy()
    starts = torch.zeros(len(pre) + 1, dtype=torch.int64)
    threads.call(_count_above, keys, least, starts.numpy())
    starts.cumsum_(0)
    features = torch.empty(int(starts[-1]), dtype=torch.int64)
    threads.call(_above, keys, least, starts.numpy(), _blocks(), features.numpy())
    return starts, features


def dots(
    rows: Float[Tensor, "row d_in"], W: Float[Tensor, "d_sae d_in"], starts: Int[Tensor, "row+1"], features: Int[Tensor, "firing"]
) -> Float[Tensor, "firing"]:
    """For each firing, its row times its feature's direction."""
    _require(rows.shape[1] == W.shape[1], f"rows: d_in {rows.shape[1]}, but directions have {W.shape[1]}")
    _require_firings(starts, features, len(rows), len(W))
    out = torch.empty(len(features))
    threads.call(_dots, rows.numpy(), W.numpy(), starts.numpy(), features.numpy(), out.numpy())
    return out


def combine(
    values: Float[Tensor, "firing"],
    W: Float[Tensor, "d_sae d_in"],
    starts: Int[Tensor, "row+1"],
    features: Int[Tensor, "firing"],
) -> Float[Tensor, "row d_in"]:
    """For each row, the directions of its features weighted by their values."""
    _require(len(values) == len(features), f"values: {len(values)} for {len(features)} firings")
    _require_firings(starts, features, len(starts) - 1, len(W))
    out = torch.empty(len(starts) - 1, W.shape[1])
    threads.call(_weighted_rows, values.numpy(), W.numpy(), starts.numpy(), features.numpy(), _blocks(), out.numpy())
    return out


def transposed(starts: Int[Tensor, "row+1"], features: Int[Tensor, "firing"], d_sae: int) -> ByFeature:
    """Firings sorted by feature, and by row within a feature."""
    _require_firings(starts, features, len(starts) - 1, d_sae)
    return ByFeature(*map(torch.from_numpy, _transposed(starts.numpy(), features.numpy(), d_sae)))


def sums(
    by_feature: ByFeature, weights: Float[Tensor, "firing"], rows: Float[Tensor, "row d_in"], out: Float[Tensor, "d_sae d_in"]
) -> None:
    """For each feature, the rows on which it fires weighted by `weights`."""
    _require(rows.shape[1] == out.shape[1], f"rows: d_in {rows.shape[1]}, but the sums have {out.shape[1]}")
    _require_firings(by_feature.starts, by_feature.rows, len(out), len(rows))
    weights = weights.index_select(0, by_feature.order)  # which looks at its indices itself
    _require(len(weights) == len(by_feature.rows), f"order: {len(weights)} places for {len(by_feature.rows)} firings")
    starts, chosen = by_feature.starts.numpy(), by_feature.rows.numpy()
    threads.call(_weighted_rows, weights.numpy(), rows.numpy(), starts, chosen, _blocks(), out.numpy())


def totals(by_feature: ByFeature, weights: Float[Tensor, "firing"]) -> Float[Tensor, "d_sae"]:
    """For each feature, the sum of the weights of its firings."""
    d_sae, order = len(by_feature.starts) - 1, by_feature.order
    _require_firings(by_feature.starts, order, d_sae, len(weights))
    return torch.from_numpy(_totals(weights.numpy(), by_feature.starts.numpy(), order.numpy()))


def unit_step(
    W: Float[Tensor, "d_sae d_in"],
    gradient: Float[Tensor, "d_sae d_in"],
    moments: tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"]],
    rate: float,
    step: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Adam's step number `step`, counted from 1, for directions that stay at unit length, in place.

    A direction has no length to learn: the gradient along it is left out, and what it grew is taken back.
    """
    arrays = [tensor.numpy() for tensor in (W, gradient, *moments)]
    _require(all(array.shape == arrays[0].shape for array in arrays), f"gradient or moments do not fit directions {list(W.shape)}")
    size, root = rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    threads.call(_unit_step, *arrays, *map(np.float32, (size, root, 1 - betas[0], betas[1], 1 - betas[1], epsilon)))


def pursue(
    along: Float[Tensor, "token d_sae"], gram: Float[Tensor, "d_sae d_sae"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Take, k times, the direction along which most of each row's residual lies: which, and how much of it; zero where none does.

    `along` holds the inner product of each residual with each direction, and is kept up to date; `gram` those of directions.
    """
    _require(gram.shape == (along.shape[1],) * 2, f"gram: {list(gram.shape)} does not fit {along.shape[1]} directions")
    features, values = torch.zeros(len(along), k, dtype=torch.int64), torch.zeros(len(along), k)
    threads.call(_pursue, along.numpy(), gram.numpy(), features.numpy(), values.numpy())
    return features, values


def _blocks() -> int:
    """Into how many pieces of about equal work a kernel cuts its rows."""
    return 8 * torch.get_num_threads()


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _require_firings(starts: Int[Tensor, "start"], features: Int[Tensor, "firing"], rows: int, d_sae: int) -> None:
    """A sparse matrix must have `rows` rows that lie end to end, and `d_sae` columns."""
    fits = len(starts) == rows + 1 and _inside(starts.numpy(), features.numpy(), d_sae)
    _require(fits, f"firings: {len(features)} firings in {len(starts) - 1} rows are no matrix of {rows} rows and {d_sae} features")


@njit(nogil=True, cache=True)
def _inside(starts, features, d_sae):
    if starts[0] != 0 or starts[-1] != len(features):
        return False
    falling = False
    for i in range(len(starts) - 1):
        falling |= starts[i] > starts[i + 1]
    outside = False
    for feature in features:
        outside |= feature < 0 or feature >= d_sae
    return not (falling or outside)


@njit(cache=True)
def _kth_largest(keys, count, k, least, most):
    """The largest integer in [least, most] that k of the first `count` keys reach; `least` where fewer do."""
    while least < most:
        middle = least + (most - least + 1) // 2
        reached = 0
        for i in range(count):
            reached += keys[i] >= middle
        if reached >= k:
            least = middle
        else:
            most = middle - 1
    return least


@njit(cache=True)
def _kth_of_few(keys, count, k, largest):
    """The same of a small k, where at least k of the first `count` keys are positive: the largest are kept in order on the way."""
    for place in range(k):
        largest[place] = 0
    for i in range(count):
        key = keys[i]
        if key > largest[0]:
            place = 0
            while place + 1 < k and largest[place + 1] < key:
                largest[place] = largest[place + 1]
                place += 1
            largest[place] = key
    return largest[0]


@njit(parallel=True, nogil=True, cache=True)
def _top(keys, k, most, blocks, features):
    rows, d_sae = keys.shape
    depth = d_sae // LANES
    if k > LANES:
        depth = 0  # lanes can't tell where the k largest are: look at every key
    for block in prange(blocks):
        largest = np.empty(LANES, keys.dtype)
        candidates = np.empty(d_sae + 1, np.int64)
        found = np.empty(d_sae, keys.dtype)
        few = np.empty(FEW, keys.dtype)
        for i in range(block * rows // blocks, (block + 1) * rows // blocks):
            row = keys[i]
            # k lanes have their largest key at or above `floor`, so the k largest keys are there too.
            floor = 1
            if depth > 0:
                for lane in range(LANES):
                    largest[lane] = row[lane]
                for level in range(1, depth):
                    for lane in range(LANES):
                        key = row[level * LANES + lane]
                        largest[lane] = key if key > largest[lane] else largest[lane]
                floor = _kth_largest(largest, LANES, k, 1, most)
            count = 0
            for lane in range(LANES if depth > 0 else 0):
                if largest[lane] >= floor:
                    for level in range(depth):
                        j = level * LANES + lane
                        candidates[count] = j
                        count += row[j] >= floor
            for j in range(depth * LANES, d_sae):
                candidates[count] = j
                count += row[j] >= floor
            for c in range(count):
                found[c] = row[candidates[c]]
            kth = floor
            if count > k:
                kth = _kth_of_few(found, count, k, few) if 0 < k <= FEW else _kth_largest(found, count, k, floor, most)
            ties = k
            for c in range(count):
                ties -= found[c] > kth
            place = 0
            for c in range(count):
                if found[c] > kth or (found[c] == kth and ties > 0):
                    ties -= found[c] == kth
                    features[i, place] = candidates[c]
                    place += 1
            if place < k:  # too few are positive
                for j in range(d_sae):
                    if row[j] < floor and place < k:
                        features[i, place] = j
                        place += 1


@njit(parallel=True, nogil=True, cache=True)
def _count_above(keys, least, starts):
    for i in prange(len(keys)):
        row = keys[i]
        count = 0
        for j in range(len(row)):
            count += row[j] > least[j]
        starts[i + 1] = count


@njit(parallel=True, nogil=True, cache=True)
def _above(keys, least, starts, blocks, features):
    for block in prange(blocks):
        candidates = np.empty(keys.shape[1] + 1, np.int64)
        for i in range(block * len(keys) // blocks, (block + 1) * len(keys) // blocks):
            row = keys[i]
            count = 0
            for j in range(len(row)):
                candidates[count] = j
                count += row[j] > least[j]
            features[starts[i] : starts[i + 1]] = candidates[:count]


@njit(parallel=True, nogil=True, cache=True, fastmath=REASSOCIATED)
def _dots(rows, W, starts, features, out):
    d_in = W.shape[1]
    for i in prange(len(starts) - 1):
        row = rows[i]
        for p in range(starts[i], starts[i + 1]):
            direction = W[features[p]]
            total = np.float32(0)
            for c in range(d_in):
                total += row[c] * direction[c]
            out[p] = total


@njit(parallel=True, nogil=True, cache=True, fastmath=REASSOCIATED)
def _weighted_rows(weights, rows, starts, chosen, blocks, out):
    """out[i] = sum of weights[p] * rows[chosen[p]] over p in [starts[i], starts[i + 1])."""
    d_in = out.shape[1]
    count = len(out)
    # Some features fire a thousand times as often as others: blocks of equal firings, not of equal rows.
    bounds = np.searchsorted(starts, np.arange(blocks + 1) * len(chosen) // blocks)
    bounds[0], bounds[blocks] = 0, count
    for block in prange(blocks):
        for i in range(bounds[block], bounds[block + 1]):
            total = out[i]
            total[:] = 0
            p, stop = starts[i], starts[i + 1]
            while p + 4 <= stop:  # four rows at a time: the running total goes through memory a quarter as often
                w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
                r0, r1, r2, r3 = rows[chosen[p]], rows[chosen[p + 1]], rows[chosen[p + 2]], rows[chosen[p + 3]]
                for c in range(d_in):
                    total[c] += w0 * r0[c] + w1 * r1[c] + w2 * r2[c] + w3 * r3[c]
                p += 4
            while p < stop:
                weight, row = weights[p], rows[chosen[p]]
                for c in range(d_in):
                    total[c] += weight * row[c]
                p += 1


@njit(parallel=True, nogil=True, cache=True, fastmath=REASSOCIATED)
def _unit_step(W, gradient, first, second, size, root, new, kept, new_square, epsilon):
    d_in = W.shape[1]
    for f in prange(len(W)):
        direction, its, mean, square = W[f], gradient[f], first[f], second[f]
        along = np.float32(0)
        for c in range(d_in):
            along += its[c] * direction[c]
        length = np.float32(0)
        for c in range(d_in):
            pull = its[c] - along * direction[c]
            mean[c] += new * (pull - mean[c])
            square[c] = kept * square[c] + new_square * pull * pull
            direction[c] -= size * mean[c] / (np.sqrt(square[c]) / root + epsilon)
            length += direction[c] * direction[c]
        length = np.float32(1) / max(np.sqrt(length), np.float32(1e-12))
        for c in range(d_in):
            direction[c] *= length


@njit(nogil=True, cache=True)
def _totals(weights, starts, order):
    out = np.zeros(len(starts) - 1, np.float32)
    for f in range(len(out)):
        for p in range(starts[f], starts[f + 1]):
            out[f] += weights[order[p]]
    return out


@njit(nogil=True, cache=True)
def _transposed(starts, features, d_sae):
    begins = np.zeros(d_sae + 1, np.int64)
    for feature in features:
        begins[feature + 1] += 1
    for f in range(d_sae):
        begins[f + 1] += begins[f]
    place = begins[:-1].copy()
    rows, order = np.empty(len(features), np.int64), np.empty(len(features), np.int64)
    for i in range(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            q = place[features[p]]
            place[features[p]] = q + 1
            rows[q], order[q] = i, p
    return begins, rows, order


@njit(parallel=True, nogil=True, cache=True, fastmath=True)
def _pursue(along, gram, features, values):
    for token in prange(len(along)):
        left = along[token]
        whole = len(left) // TOGETHER * TOGETHER
        for step in range(features.shape[1]):
            most, first = np.float32(0), 0
            for start in range(0, whole, TOGETHER):
                here = left[start]
                for j in range(start, start + TOGETHER):
                    here = left[j] if left[j] > here else here
                if here > most:
                    most, first = here, start
            for j in range(whole, len(left)):
                if left[j] > most:
                    most, first = left[j], j
            if most <= 0:
                break
            best = first
            while left[best] != most:
                best += 1
            features[token, step], values[token, step] = best, most
            row = gram[best]
            for j in range(len(left)):
                left[j] -= most * row[j]
