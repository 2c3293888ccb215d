"""What a pool is compared with that has to be trained for it (C9): as much work, spent otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import training
from sae_stability.evaluation import ROWS, Fit
from sae_stability.experiments.pools import CALIBRATION, Seeds, fine_tuned
from sae_stability.language.activations import Activations
from sae_stability.pooling import SHARED, calibrated, joined, measure
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sae import SAE
from sae_stability.saes.sparse import Codes
from sae_stability.study import Recipe

LONGER, WIDER = "longer training", "wider, pruned, fine-tuned"
BAGGED, BOOSTED = "bagging", "boosting"
PAID = 6
"""Most SAEs of a kind that are trained: where there are many groups, those of the first."""


def trained(seeds: Seeds, recipe: Recipe, width: int, device: str = "cpu") -> dict[str, Ensemble]:
    """SAEs as many times as long in training as a pool has seeds, and as many times as wide, of which the strongest features are
    kept and fine-tuned as pools are."""
    size, first = len(seeds.groups[0]), [seeds.ensemble.seeds[group[0]] for group in seeds.groups[:PAID]]
    recipe = recipe.model_copy(update={"coefficient": seeds.ensemble.coefficient or None})
    longer = recipe.model_copy(update={"passes": recipe.passes * size})
    wider = recipe.model_copy(update={"d_sae": recipe.d_sae * size})
    long = training.train(longer, seeds.train, first, described=LONGER, device=device)
    wide = training.train(wider, seeds.train, first, described=WIDER, device=device)
    return {LONGER: long, WIDER: fine_tuned(pruned(wide, width, seeds), recipe, seeds, device)}


def pruned(wide: Ensemble, width: int, seeds: Seeds) -> Ensemble:
    """The strongest features of each SAE, with the L0 of the seeds."""
    x, parts = seeds.train.data[:CALIBRATION].float(), []
    for position in range(len(wide.seeds)):
        sae = wide.dictionary(position)
        kept = measure(sae, x).energy.topk(width).indices.sort().values
        weights = {name: tensor if name in SHARED else tensor[kept] for name, tensor in sae.parameters._asdict().items()}
        parts.append(calibrated(replace(sae, parameters=type(sae.parameters)(**weights)), x, seeds.l0))
    return joined(parts, wide)


@dataclass(frozen=True)
class Sum:
    """SAEs whose reconstructions are added up (*Ensembling Sparse Autoencoders*, Gadgil et al., arXiv:2505.16077).

    It has the features of all of them, and the sum of their L0. In *bagging* all read the activations, and their mean is taken; in
    *boosting* each reads what those before it leave.
    """

    saes: list[SAE]
    boosted: bool

    @property
    def directions(self) -> Float[Tensor, "d_sum d_in"]:
        return torch.cat([sae.directions for sae in self.saes])

    def parts(self, x: Float[Tensor, "token d_in"]) -> Iterator[tuple[Codes, Float[Tensor, "token d_in"]]]:
        """The codes of each SAE in turn, and what it adds to the reconstruction."""
        for sae in self.saes:
            codes = sae.codes(x)
            part = codes.decode(sae.W_dec) + sae.parameters.b_dec
            yield codes, part if self.boosted else part / len(self.saes)
            if self.boosted:
                x = x - part

    def rebuild(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """The reconstruction."""
        return torch.stack([part for _, part in self.parts(x)]).sum(0)


def bagged(seeds: Seeds) -> list[Sum]:
    """The seeds of each group."""
    return [Sum([seeds.saes[one] for one in group], boosted=False) for group in seeds.groups[:PAID]]


def boosted(seeds: Seeds, recipe: Recipe, device: str = "cpu") -> list[Sum]:
    """The first seed of each group, and SAEs of its other seeds that are trained on what is left, one after another."""
    chains, data = [], seeds.train.data
    for group in tqdm(seeds.groups[:PAID], BOOSTED, unit="chain", disable=None):
        saes, left = [seeds.saes[group[0]]], data.to(torch.float32, copy=True)
        for one in group[1:]:
            _take_away(left, saes[-1], device)
            its_seed, rest = [seeds.ensemble.seeds[one]], Activations.of(left.to(data.dtype))
            saes.append(training.train(recipe, rest, its_seed, described=BOOSTED, device=device).dictionary(0))
        chains.append(Sum(saes, boosted=True))
    return chains


def _take_away(left: Float[Tensor, "token d_in"], sae: SAE, device: str) -> None:
    """What an SAE makes of activations, from these, in place; it is computed on `device`."""
    there = replace(sae, parameters=type(sae.parameters)(*(tensor.to(device) for tensor in sae.parameters)))
    for rows in left.split(ROWS):
        x = rows.to(device)
        rows.copy_(x - there.codes(x).decode(there.W_dec) - there.parameters.b_dec)


def fit(
    sums: list[Sum], activations: Activations, cluster: Int[np.ndarray, "token"], like: Ensemble
) -> tuple[Fit, Float[Tensor, "sum d_sum"]]:
    """As `evaluation.fit`, in the units of an ensemble; and the mean energy of each feature."""
    rows, features = len(activations), len(sums[0].directions)
    kinds, cluster = np.unique(cluster[:rows], return_inverse=True)
    firings, energy = torch.zeros(len(sums), features, dtype=torch.int64), torch.zeros(len(sums), features, dtype=torch.float64)
    residual, total = np.zeros((len(sums), len(kinds))), np.zeros(len(kinds))
    for start in tqdm(range(0, rows, ROWS), "evaluation", unit="batch", disable=None):
        x, of = activations.data[start : start + ROWS].float(), cluster[start : start + ROWS]
        total += np.bincount(of, (x - activations.mean).square().sum(1).numpy(), len(kinds))
        for number, chain in enumerate(sums):
            left, first = x, 0
            for sae, (codes, part) in zip(chain.saes, chain.parts(x), strict=True):
                left, its = left - part, slice(first, first + len(sae.directions))
                firings[number, its] += torch.bincount(codes.fired(), minlength=len(sae.directions))
                energy[number, its].index_add_(0, codes.features, codes.values.double().square())
                first = its.stop
            residual[number] += np.bincount(of, left.square().sum(1).numpy(), len(kinds))
    lengths = torch.stack([chain.directions.double().square().sum(1) for chain in sums])
    return Fit(firings, rows, residual * like.scale**2, total * like.scale**2), energy / rows * lengths
