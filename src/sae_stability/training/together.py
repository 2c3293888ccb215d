"""Small TopK SAEs trained side by side in one tensor: the steps of `loop.py`, in as few calls as one SAE takes.

A step of an SAE of a hundred features is less work than the calls that do it. Here the features of all seeds are those of one long
SAE, in which a token's features are chosen among its own seed's. Nothing is kept on the way, and nobody watches for divergence.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability.language.activations import Activations
from sae_stability.saes import compiled
from sae_stability.saes.parameters import Parameters
from sae_stability.study import Recipe
from sae_stability.training.descent import descend
from sae_stability.training.loop import STRETCH, schedule, shuffled_rows
from sae_stability.training.revival import AUX_COEFFICIENT


def train_together(recipe: Recipe, activations: Activations, seeds: Sequence[int], sae: Parameters) -> None:
    """Train `sae`, in place: the weights of one SAE a seed, stacked, as they begin. TopK on the CPU, in float32."""
    count, d_sae, d_in = sae.W_dec.shape
    batch, steps_a_pass = recipe.batch, len(activations) // recipe.batch
    gradient = Parameters(*(torch.zeros_like(tensor) for tensor in sae))
    W_enc_rows, b_enc, W_dec = _end_to_end(sae)
    into_W_enc_rows, into_b_enc, into_W_dec = _end_to_end(gradient)
    optimizer = torch.optim.Adam(list(sae), lr=recipe.rate, fused=True)
    rows = count * batch
    starts = torch.arange(0, rows * recipe.k + 1, recipe.k)
    first_of_own = torch.arange(0, count * d_sae, d_sae).repeat_interleave(batch * recipe.k)
    last_fired = torch.zeros(count, d_sae, dtype=torch.int64)
    steps = recipe.passes * steps_a_pass
    for step in range(steps):
        visit, place = divmod(step, steps_a_pass)
        if place % STRETCH == 0:
            places = range(place, min(place + STRETCH, steps_a_pass))
            stretch = [activations.normalised(shuffled_rows(recipe, seed, visit, places, len(activations))) for seed in seeds]
            batches = torch.stack(stretch).view(count, len(places), batch, d_in)
        centred = batches[:, place % STRETCH] - sae.b_dec[:, None]
        tokens = centred.view(rows, d_in)
        pre = torch.baddbmm(sae.b_enc[:, None], centred, sae.W_enc_rows.mT)
        features = compiled.top(pre.view(rows, d_sae), recipe.k).flatten().add_(first_of_own)
        values = compiled.dots(tokens, W_enc_rows, starts, features).add_(b_enc.index_select(0, features)).relu_()
        fires = values > 0
        error = compiled.combine(values, W_dec, starts, features).sub_(tokens)
        upstream = error * (2 / batch)
        into_pre = compiled.dots(upstream, W_dec, starts, features) * fires
        firings = compiled.transposed(starts, features, count * d_sae)
        compiled.sums(firings, values, upstream, into_W_dec)
        compiled.sums(firings, into_pre, tokens, into_W_enc_rows)
        into_b_enc.copy_(compiled.totals(firings, into_pre))
        through_encoder = torch.bmm(gradient.b_enc[:, None], sae.W_enc_rows)[:, 0]
        gradient.b_dec.copy_(upstream.view(centred.shape).sum(1) - through_encoder)
        dead = (step - last_fired) * batch > recipe.dead_after
        if dead.any():
            _revive(sae, gradient, centred, error.view(centred.shape), pre, dead)
        optimizer.param_groups[0]["lr"] = recipe.rate * schedule(step / steps, recipe.warmup, recipe.decay)
        descend(optimizer, sae, gradient, unit_decoder=True, clip=None)
        last_fired.view(-1).scatter_reduce_(0, features, fires * step, "amax")


def _end_to_end(sae: Parameters) -> list[Tensor]:
    """The encoder, its biases and the decoder as those of one SAE with the features of all."""
    return [tensor.flatten(0, 1) for tensor in (sae.W_enc_rows, sae.b_enc, sae.W_dec)]


def _revive(
    sae: Parameters,
    gradient: Parameters,
    centred: Float[Tensor, "seed token d_in"],
    error: Float[Tensor, "seed token d_in"],
    pre: Float[Tensor, "seed token d_sae"],
    dead: Bool[Tensor, "seed d_sae"],
) -> None:
    """As `revival.revive` with as many features of each seed as one has dead ones, living ones silent among them; `pre` are the
    pre-activations of all."""
    (count, batch, d_in), d_sae = centred.shape, pre.shape[2]
    most = int(dead.sum(1).max())
    chosen = torch.argsort(dead.byte(), dim=1, descending=True, stable=True)[:, :most]
    place = (chosen + torch.arange(0, count * d_sae, d_sae)[:, None]).flatten()  # among the features of all
    z = pre.gather(2, chosen[:, None].expand(-1, batch, -1)).relu_() * dead.gather(1, chosen)[:, None]
    if most > d_in // 2:
        strongest = torch.topk(z, d_in // 2, dim=2, sorted=False)
        z = torch.zeros_like(z).scatter_(2, strongest.indices, strongest.values)
    directions = sae.W_dec.flatten(0, 1).index_select(0, place).view(count, most, d_in)
    upstream = torch.baddbmm(error, z, directions) * (2 * AUX_COEFFICIENT / batch)
    into_pre = torch.bmm(upstream, directions.mT) * (z > 0)
    into_W_enc_rows, into_b_enc, into_W_dec = _end_to_end(gradient)
    into_W_dec.index_add_(0, place, torch.bmm(z.mT, upstream).flatten(0, 1))
    into_W_enc_rows.index_add_(0, place, torch.bmm(into_pre.mT, centred).flatten(0, 1))
    into_b_enc.index_add_(0, place, into_pre.sum(1).flatten())
