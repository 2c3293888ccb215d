"""Goes on training SAEs from weights that are there: a short training under the same engine, of pools and of what they are held
against."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_stability.language.activations import Activations
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.parameters import Parameters
from sae_stability.study import Recipe
from sae_stability.training import prepare
from sae_stability.training.loop import Training


class _DecoderAlone(Training):
    """A training in which directions move and codes stay: b_dec, which encoders read too, stays with them."""

    def _moved(self, sae: Parameters) -> list[Tensor]:
        return [sae.W_dec]


def finetune(
    start: Ensemble, recipe: Recipe, activations: Activations, device: str = "cpu", decoder_alone: bool = False
) -> Ensemble:
    """Train each SAE of `start` on, with its normalisation and width, and Adam's moments from zero.

    The recipe says on how many tokens and at which rate. The seeds of `start` set the order of the tokens. With `decoder_alone`
    only directions move. Where the tokens fill no batch of the recipe's, they are one.
    """
    short = {
        "d_sae": start.d_sae,
        "k": start.k,
        "coefficient": start.coefficient or None,
        "batch": min(recipe.batch, recipe.tokens),
    }
    recipe = recipe.model_copy(update=short)
    job = prepare(recipe, replace(activations, mean=start.mean, scale=start.scale), start.seeds, device=device)
    with tqdm(disable=True) as bar:
        inputs = (job.recipe, job.seeds, job.coefficients, job.visits, job.blocks.d_in, job.folder)
        training = (_DecoderAlone if decoder_alone else Training)(*inputs, torch.device(device), np.inf, bar)
        for trained, begun in zip(training.parameters, start.parameters, strict=True):
            trained.copy_(begun)
        for visit in range(len(job.visits)):
            training.consume(visit, job.blocks.block(0))
        return training.finish(job.blocks.block(0))
