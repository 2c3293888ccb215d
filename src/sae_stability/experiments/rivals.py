"""What a pool is compared with that has to be trained for it (C9): as much work, spent otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability import threads, training
from sae_stability.evaluation import ROWS, Fit, Rebuilt, fit_of
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


def trained(seeds: Seeds, recipe: Recipe, width: int, device: str = "cpu", folder: Path | None = None) -> dict[str, Ensemble]:
    """SAEs as many times as long in training as a pool has seeds, and as many times as wide, of which the strongest features are
    kept and fine-tuned as pools are. With a `folder`, a run that is killed goes on where it was."""
    size, first = len(seeds.groups[0]), [seeds.ensemble.seeds[group[0]] for group in seeds.groups[:PAID]]
    recipe = recipe.model_copy(update={"coefficient": seeds.ensemble.coefficient or None})
    longer = recipe.model_copy(update={"passes": recipe.passes * size})
    wider = recipe.model_copy(update={"d_sae": recipe.d_sae * size})
    long = training.train(longer, seeds.train, first, folder and folder / "longer", LONGER, device)
    wide = training.train(wider, seeds.train, first, folder and folder / "wider", WIDER, device)
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

    def rebuild(self, x: Float[Tensor, "token d_in"]) -> tuple[Int[Tensor, "firing"], Float[Tensor, "token d_in"]]:
        """The feature of each firing, and the reconstruction."""
        fired, parts = zip(*((codes.fired(), part) for codes, part in self.parts(x)), strict=True)
        width = len(self.saes[0].directions)  # all are of one recipe
        return torch.cat([its + number * width for number, its in enumerate(fired)]), torch.stack(parts).sum(0)

    def energy(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "d_sum"]:
        """The mean energy of each feature."""
        energy = []
        for sae, (_, part) in zip(self.saes, self.parts(x), strict=True):
            energy.append(measure(sae, x).energy)
            if self.boosted:
                x = x - part
        return torch.cat(energy)


def bagged(seeds: Seeds) -> list[Sum]:
    """The seeds of each group."""
    return [Sum([seeds.saes[one] for one in group], boosted=False) for group in seeds.groups[:PAID]]


def boosted(seeds: Seeds, recipe: Recipe, device: str = "cpu", folder: Path | None = None) -> list[Sum]:
    """The first seed of each group, and SAEs of its other seeds that are trained on what is left, one after another. With a
    `folder`, a run that is killed goes on where it was."""
    data, groups = seeds.train.data, seeds.groups[:PAID]

    def chain(number: int) -> Sum:
        group = groups[number]
        saes, left = [seeds.saes[group[0]]], data.to(torch.float32, copy=True)
        for one in group[1:]:
            _take_away(left, saes[-1], device)
            seed, rest = seeds.ensemble.seeds[one], Activations.of(left.to(data.dtype))
            there = folder and folder / f"boosted-{seed}"
            saes.append(training.train(recipe, rest, [seed], there, BOOSTED, device).dictionary(0))
        return Sum(saes, boosted=True)

    return threads.each_seed(chain, len(groups), BOOSTED, one_at_a_time=device != "cpu")


def _take_away(left: Float[Tensor, "token d_in"], sae: SAE, device: str) -> None:
    """What an SAE makes of activations, from these, in place; it is computed on `device`."""
    there = replace(sae, parameters=type(sae.parameters)(*(tensor.to(device) for tensor in sae.parameters)))
    for rows in left.split(ROWS):
        x = rows.to(device)
        rows.copy_(x - there.codes(x).decode(there.W_dec) - there.parameters.b_dec)


def fit(sums: list[Sum], activations: Activations, cluster: Int[np.ndarray, "token"], units: Ensemble) -> Fit:
    """As `evaluation.fit`, of sums of SAEs, in the units of an ensemble."""

    def rebuilt(x: Float[Tensor, "token d_in"]) -> Rebuilt:
        for chain in sums:
            fired, again = chain.rebuild(x.float())
            yield fired, (again - x) * units.scale

    return fit_of(rebuilt, (len(sums), len(sums[0].directions)), activations, cluster, units)
