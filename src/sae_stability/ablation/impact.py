"""The effect of each feature alone: exact for reconstruction, to first and second order for prediction.

Without feature i the SAE's reconstruction lacks a_i d_i: its activation times its decoder direction. Codes are not chosen again.

A trained model could scale what any direction carries by its weights, and has settled where that no longer helps. So the first
order of a removal is near zero on average whatever the feature does, as E[a r.d] is for reconstruction, and its effect shows in
the second order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability.evaluation import Encoded
from sae_stability.language.interventions import BATCH, Reading, intervene
from sae_stability.language.models import device_of
from sae_stability.saes.ensemble import Ensemble


@dataclass(frozen=True)
class Impact:
    """What the removal of each feature alone does to the reconstruction, summed over tokens, in normalised units."""

    firings: Float[Tensor, "seed d_sae"]
    """Tokens on which each feature fires."""
    activation: Float[Tensor, "seed d_sae"]
    """Its activation."""
    energy: Float[Tensor, "seed d_sae"]
    """|a_i d_i|^2: what the feature writes."""
    reconstruction: Float[Tensor, "seed d_sae"]
    """How much the squared error grows: exactly |a_i d_i|^2 + 2 a_i r.d_i, with r = x - x_hat (PAPER, marginal impact)."""
    of_sets: dict[str, Float[Tensor, "seed cluster"]]
    """That, summed over the features of some sets, by the cluster of the token: for intervals that resample text."""


def impact_on_reconstruction(
    held_out: Encoded, cluster: Int[np.ndarray, "token"], members: Mapping[str, Bool[Tensor, "seed d_sae"]]
) -> Impact:
    """The effect of every feature of every seed, in one pass over the activations, whose rows come from `cluster`."""
    ensemble, seeds = held_out.ensemble, len(held_out.ensemble.seeds)
    kinds, cluster = np.unique(cluster[: len(held_out.activations)], return_inverse=True)
    of_token = torch.from_numpy(cluster)
    firings, activation, energy, cross = torch.zeros(4, seeds, ensemble.d_sae, dtype=torch.float64)
    of_sets = {name: torch.zeros(seeds, len(kinds), dtype=torch.float64) for name in members}
    progress = tqdm(held_out.batches(), "impact on reconstruction", total=len(held_out.codes), unit="batch", disable=None)
    for rows, x, coded in progress:
        for seed, (sae, codes) in enumerate(coded):
            residual = x - codes.decode(sae.W_dec) - sae.b_dec
            squares = codes.values.square() * sae.W_dec.square().sum(1)[codes.features]
            along = codes.values * codes.into(residual, sae.W_dec)
            for total, values in ((firings, codes.values > 0), (activation, codes.values), (energy, squares), (cross, along)):
                total[seed].index_add_(0, codes.features, values.double())
            growth, where = (squares + 2 * along).double(), of_token[rows][codes.rows()]
            for name, member in members.items():
                of_sets[name][seed].index_add_(0, where, growth * member[seed][codes.features])
    return Impact(firings, activation, energy, energy + 2 * cross, of_sets)


@dataclass(frozen=True)
class PredictionImpact:
    """The change of the cross-entropy, in nats a token, that the removal of each feature alone makes."""

    first_order: Float[Tensor, "seed d_sae"]
    """-a_i g.d_i, with g the gradient of the cross-entropy in the activation (gradient x activation)."""
    second_order: Float[Tensor, "seed d_sae"]
    """(sum of a_i h.d_i over a context)^2 / 2, with h the same gradient where targets are drawn from the model's own prediction.

    Its expectation is half the curvature of the cross-entropy of a calibrated model (Fisher information; Martens, arXiv:1412.1193).
    """
    by_context: Float[Tensor, "seed context d_sae"]
    """Both orders, in nats, by context: for intervals that resample text. In float32."""


def impact_on_prediction(site: Reading, ensemble: Ensemble) -> PredictionImpact:
    """The effect of every feature of every seed on held-out tokens: two backward passes, whatever the seeds.

    Memory beside the model's is a number for each feature of each seed in each context.
    """
    contexts, scored, generator = site.spread(), 0, torch.Generator().manual_seed(0)
    first, second = torch.zeros(2, len(ensemble.seeds), ensemble.d_sae, dtype=torch.float64)
    by_context = torch.zeros(len(ensemble.seeds), len(contexts.tokens), ensemble.d_sae)
    for start in tqdm(range(0, len(contexts.tokens), BATCH), "impact on prediction", unit="batch", disable=None):
        rows = slice(start, start + BATCH)
        ids, text = torch.from_numpy(contexts.tokens[rows]).long(), torch.from_numpy(contexts.is_text[rows])
        scored += int(text[:, 1:].sum())
        x, *gradients = _gradients(site, ids, text, generator)
        of_data, of_model = (gradient[text].float() / ensemble.scale for gradient in gradients)
        context = text.nonzero()[:, 0]
        for seed, (sae, codes) in enumerate(ensemble.codes(ensemble.normalise(x[text]))):
            at, within = context[codes.rows()] * ensemble.d_sae + codes.features, []
            for gradient in (of_data, of_model):
                along = (codes.values * codes.into(gradient, sae.W_dec)).double()
                within.append(along.new_zeros(len(ids) * ensemble.d_sae).index_add_(0, at, along).view(len(ids), -1))
            orders = -within[0], within[1].square() / 2
            first[seed] += orders[0].sum(0)
            second[seed] += orders[1].sum(0)
            by_context[seed, rows] = (orders[0] + orders[1]).float()
    return PredictionImpact(first / scored, second / scored, by_context)


def true_impact_on_prediction(
    site: Reading, ensemble: Ensemble, features: Int[Tensor, "seed chosen"]
) -> Float[Tensor, "seed chosen"]:
    """What `impact_on_prediction` approximates, by removing each of some features in turn: a pass of the model for each."""

    def edits(x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for seed, (sae, codes) in enumerate(ensemble.codes(ensemble.normalise(x))):
            for place, feature in enumerate(features[seed].tolist()):
                alone = codes._replace(values=codes.values * (codes.features == feature))
                yield (seed, place), x - alone.decode(sae.W_dec) / ensemble.scale

    predicted = intervene(site, edits, "true impact")
    change = torch.zeros(features.shape, dtype=torch.float64)
    for (seed, place), nats in predicted.nats.items():
        change[seed, place] = float((nats - predicted.clean).sum() / predicted.tokens.sum())
    return change


def _gradients(
    site: Reading, ids: Int[Tensor, "context position"], text: Bool[Tensor, "context position"], generator: torch.Generator
) -> list[Float[Tensor, "context position d_in"]]:
    """The activations at a site, and the gradients there of the cross-entropy summed over text tokens.

    The first is that of the tokens that follow, the second that of tokens drawn from the model's prediction: on the CPU, so that
    they are the same on every device. All come back to the CPU; gradients are in the model's dtype, and losses in float32.
    """
    device = device_of(site.bridge)
    ids, text = ids.to(device), text.to(device)
    at_site: list[Tensor] = []

    def cut(value: Tensor, hook) -> Tensor:
        at_site.append(value.detach().requires_grad_())
        return at_site[0]

    logits = site.bridge.run_with_hooks(ids, fwd_hooks=[(site.hook_name, cut)])[:, :-1].float()[text[:, 1:]]
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(device)
    of = [F.cross_entropy(logits, targets, reduction="sum") for targets in (ids[:, 1:][text[:, 1:]], drawn)]
    gradients = (torch.autograd.grad(nats, at_site, retain_graph=True)[0] for nats in of)
    return [at_site[0].detach().cpu(), *(gradient.cpu() for gradient in gradients)]
