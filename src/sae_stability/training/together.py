"""Small TopK SAEs trained side by side: the steps of `loop.py`, in as few calls as one SAE takes.

A step of an SAE of a hundred features is less work than the calls that do it. Here pre-activations take one call for all seeds, and
kernels do the rest: token by token one chooses features, reconstructs, and adds to the gradient while all of it is in the first
cache, and another takes Adam's step. Nothing is kept on the way, and nobody watches for divergence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from sae_stability.language.activations import Activations
from sae_stability.saes.compiled import REASSOCIATED, unit_step
from sae_stability.saes.parameters import Parameters
from sae_stability.study import Recipe
from sae_stability.training.loop import STRETCH, schedule, shuffled_rows
from sae_stability.training.revival import AUX_COEFFICIENT

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as PyTorch has them
GROUP = 16  # pre-activations whose largest is found together, in a vector register


def train_together(recipe: Recipe, activations: Activations, seeds: Sequence[int], sae: Parameters) -> None:
    """Train `sae`, in place: the weights of one SAE a seed, stacked, as they begin. TopK on the CPU, in float32."""
    count, d_sae, d_in = sae.W_dec.shape
    batch, steps_a_pass = recipe.batch, len(activations) // recipe.batch
    gradient = Parameters(*(torch.zeros_like(tensor) for tensor in sae))
    weights, into = (tuple(tensor.numpy() for tensor in each) for each in (sae, gradient))
    moments = [Parameters(*(torch.zeros_like(tensor) for tensor in sae)) for _ in range(2)]
    error = np.empty((count, batch, d_in), np.float32)
    last_fired = np.zeros((count, d_sae), np.int64)
    steps = recipe.passes * steps_a_pass
    for step in range(steps):
        visit, place = divmod(step, steps_a_pass)
        if place % STRETCH == 0:
            places = range(place, min(place + STRETCH, steps_a_pass))
            stretch = [activations.normalised(shuffled_rows(recipe, seed, visit, places, len(activations))) for seed in seeds]
            batches = torch.stack(stretch).view(count, len(places), batch, d_in)
        centred = batches[:, place % STRETCH] - sae.b_dec[:, None]
        pre = torch.baddbmm(sae.b_enc[:, None], centred, sae.W_enc_rows.mT)
        seen = centred.numpy(), pre.numpy()
        dead = (step - last_fired) * batch > recipe.dead_after
        _gradients(*seen, recipe.k, step, weights, into, error, last_fired)
        if dead.any():
            _revive(*seen, error, dead, weights, into)
        rate = recipe.rate * schedule(step / steps, recipe.warmup, recipe.decay)
        for name, *of in zip(sae._asdict(), sae, gradient, *moments, strict=True):
            if name == "W_dec":
                W, its, first, second = (tensor.view(-1, d_in) for tensor in of)
                unit_step(W, its, (first, second), rate, step + 1, BETAS, EPSILON)
            else:
                parameter, its, first, second = (tensor.view(-1).numpy() for tensor in of)
                _adam(parameter, its, first, second, rate, step + 1)


@njit(nogil=True, cache=True, fastmath=REASSOCIATED)
def _adam(parameter, gradient, first, second, rate, step):
    """A step of Adam with PyTorch's defaults, in place (Kingma & Ba, arXiv:1412.6980)."""
    beta1, beta2, eps = np.float32(BETAS[0]), np.float32(BETAS[1]), np.float32(EPSILON)
    size, root = np.float32(rate / (1 - BETAS[0] ** step)), np.float32((1 - BETAS[1] ** step) ** 0.5)
    for i in range(len(parameter)):
        first[i] += (1 - beta1) * (gradient[i] - first[i])
        second[i] = beta2 * second[i] + (1 - beta2) * gradient[i] * gradient[i]
        parameter[i] -= size * first[i] / (np.sqrt(second[i]) / root + eps)


@njit(nogil=True, cache=True)
def _strongest(row, count, largest, k, features):
    """The k largest of the first `count` numbers of `row`, as far as they are positive: how many there are. `row` is spent.

    `row` comes in groups of `GROUP`, and `largest` holds one number a group.
    """
    if count <= k:
        found = 0
        for place in range(count):
            features[found] = place
            found += row[place // GROUP, place % GROUP] > 0
        return found
    for group in range(len(row)):
        largest[group] = _largest(row, group)
    for found in range(k):
        best = 0
        for group in range(1, len(row)):
            best = group if largest[group] > largest[best] else best
        if largest[best] <= 0:
            return found
        place = 0
        while row[best, place] != largest[best]:
            place += 1
        features[found], row[best, place] = best * GROUP + place, 0
        largest[best] = _largest(row, best)
    return k


@njit(nogil=True, cache=True, fastmath=True)
def _largest(row, group):
    largest = np.float32(0)
    for place in range(GROUP):
        largest = row[group, place] if row[group, place] > largest else largest
    return largest


@njit(nogil=True, cache=True, fastmath=REASSOCIATED)
def _add(x, error, scale, features, values, W_dec, into_W_enc_rows, into_b_enc, into_W_dec):
    """What `scale` times the squared length of a token's error gives the weights of the features that fire on it."""
    for feature in features:
        value, direction, along = scale * values[feature], W_dec[feature], np.float32(0)
        for c in range(len(x)):
            along += error[c] * direction[c]
        along *= scale
        into_b_enc[feature] += along
        to_encoder, to_decoder = into_W_enc_rows[feature], into_W_dec[feature]
        for c in range(len(x)):
            to_encoder[c] += along * x[c]
            to_decoder[c] += value * error[c]


@njit(nogil=True, cache=True, fastmath=REASSOCIATED)
def _decode(features, values, W_dec, out):
    """Add the directions of features, weighted by their values."""
    for feature in features:
        value, direction = values[feature], W_dec[feature]
        for c in range(len(out)):
            out[c] += value * direction[c]


@njit(nogil=True, cache=True, fastmath=REASSOCIATED)
def _gradients(centred, pre, k, step, weights, into, error, last_fired):
    """What TopK's loss gives each weight, written to `into`; `error` is x_hat - x; what fires is noted in `last_fired`."""
    W_enc_rows, _, W_dec, _ = weights
    into_W_enc_rows, into_b_enc, into_W_dec, into_b_dec = into
    (seeds, batch, d_in), d_sae = centred.shape, pre.shape[2]
    groups, scale = (d_sae + GROUP - 1) // GROUP, np.float32(2 / batch)
    row, largest, features = np.zeros((groups, GROUP), np.float32), np.empty(groups, np.float32), np.empty(k, np.int64)
    flat = row.reshape(-1)
    into_W_enc_rows[:], into_b_enc[:], into_W_dec[:], into_b_dec[:] = 0, 0, 0, 0
    for s in range(seeds):
        for token in range(batch):
            x, values, left = centred[s, token], pre[s, token], error[s, token]
            for feature in range(d_sae):
                flat[feature] = values[feature]
            fired = features[: _strongest(row, d_sae, largest, k, features)]
            for feature in fired:
                last_fired[s, feature] = step
            for c in range(d_in):
                left[c] = -x[c]
            _decode(fired, values, W_dec[s], left)
            for c in range(d_in):
                into_b_dec[s, c] += scale * left[c]
            _add(x, left, scale, fired, values, W_dec[s], into_W_enc_rows[s], into_b_enc[s], into_W_dec[s])
        for feature in range(d_sae):  # tokens are centred on b_dec
            into_b_dec[s] -= into_b_enc[s, feature] * W_enc_rows[s, feature]


@njit(nogil=True, cache=True, fastmath=REASSOCIATED)
def _revive(centred, pre, error, dead, weights, into):
    """As `revival.revive`, for each seed."""
    into_W_enc_rows, into_b_enc, into_W_dec, _ = into
    (seeds, batch, d_in), W_dec = centred.shape, weights[2]
    scale, left = np.float32(2 * AUX_COEFFICIENT / batch), np.empty(d_in, np.float32)
    for s in range(seeds):
        of_dead = np.flatnonzero(dead[s])
        most, groups = min(d_in // 2, len(of_dead)), (len(of_dead) + GROUP - 1) // GROUP
        row, largest, features = np.zeros((groups, GROUP), np.float32), np.empty(groups, np.float32), np.empty(most, np.int64)
        flat = row.reshape(-1)
        for token in range(batch if most else 0):
            x, values = centred[s, token], pre[s, token]
            for place, feature in enumerate(of_dead):
                flat[place] = values[feature]
            fired = features[: _strongest(row, len(of_dead), largest, most, features)]
            for number, place in enumerate(fired):
                fired[number] = of_dead[place]
            left[:] = error[s, token]
            _decode(fired, values, W_dec[s], left)
            _add(x, left, scale, fired, values, W_dec[s], into_W_enc_rows[s], into_b_enc[s], into_W_dec[s])
