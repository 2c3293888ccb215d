"""Pools of disjoint groups of seeds, and what the same work buys otherwise (C9): all alike in width and L0."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import training
from sae_stability.language.activations import Activations
from sae_stability.matching import stability
from sae_stability.pooling import (
    SHARED,
    Measured,
    Representative,
    Stars,
    assembled,
    calibrated,
    joined,
    measure,
    represent,
    stars,
    unlike,
)
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sae import SAE
from sae_stability.study import Recipe
from sae_stability.training.finetuning import finetune

GROUPS = 3
"""Disjoint groups that the seeds are split into; what is left over is held out."""
SEEDS = 6
"""From which there are three groups of two."""
CALIBRATION = 50_000
"""Training tokens on which energies are measured and pools are brought to the L0 of their SAEs."""
TUNING = 0.1
"""Tokens of the fine-tuning, as a share of those of the training."""
RATE = 1 / 3
"""Its peak rate over that of the training. Share and rate were chosen on the main cell of `embedded`."""
SINGLE, MEDOIDS, MEANS = "single", "medoids", "means"
TUNED, TUNED_MEDOIDS = "means, fine-tuned", "medoids, fine-tuned"
TUNED_SINGLE, RANDOM = "single, fine-tuned", "random features, fine-tuned"
LONGER, WIDER = "longer training", "wider, pruned, fine-tuned"
POOLED: dict[str, Representative] = {MEDOIDS: "medoid", MEANS: "mean"}


@dataclass(frozen=True)
class Seeds:
    """The SAEs that are pooled, and what their features do on some training tokens."""

    ensemble: Ensemble
    saes: list[SAE]
    measured: list[Measured]
    train: Activations
    threshold: float

    @classmethod
    def of(cls, ensemble: Ensemble, train: Activations, threshold: float) -> "Seeds":
        saes, x = [ensemble.dictionary(position) for position in range(len(ensemble.seeds))], train.data[:CALIBRATION].float()
        return cls(ensemble, saes, [measure(sae, x) for sae in saes], train, threshold)

    @property
    def directions(self) -> Float[Tensor, "seed d_sae d_in"]:
        return self.ensemble.W_dec

    @property
    def energy(self) -> Float[Tensor, "seed d_sae"]:
        return torch.stack([of_sae.energy for of_sae in self.measured])

    @property
    def l0(self) -> float:
        return float(np.mean([of_sae.l0 for of_sae in self.measured]))

    def stars(self, group: Sequence[int]) -> dict[Representative, Stars]:
        """The stars of a group, by what stands for them: which of them are alike depends on it."""
        saes = [self.saes[one] for one in group]
        found = stars(saes, [self.measured[one] for one in group], self.threshold)
        return {of: unlike(found, saes, self.threshold, of) for of in POOLED.values()}

    def widths(self, of_groups: Sequence[Stars]) -> int:
        """How many features each pool has: as many as an SAE, or as there are."""
        return min(self.ensemble.d_sae, *map(len, of_groups))

    def pools(self, partition: int) -> Iterator[pd.DataFrame]:
        """How much pools of the groups of one partition have in common, by what stands for a star."""
        groups = split(len(self.saes), partition)
        by = [self.stars(group) for group in groups]
        for name, representative in POOLED.items():
            of_groups = [of_group[representative] for of_group in by]
            width, W_dec, energy = self.widths(of_groups), [], []
            for group, found in zip(groups, of_groups, strict=True):
                chosen = found.take(np.arange(width))
                W_dec.append(represent(chosen, self.directions[group], representative))
                energy.append(torch.from_numpy(chosen.energy))
            yield shares(torch.stack(W_dec), torch.stack(energy), self.threshold).assign(product=name)

    def pooled(self, group: Sequence[int], found: Stars, representative: Representative) -> SAE:
        """The SAE of some stars of a group, with the L0 of its seeds."""
        chosen = [self.saes[one] for one in group]
        return calibrated(assembled(chosen, found, representative), self.train.data[:CALIBRATION].float(), self.l0)


def split(seeds: int, partition: int) -> list[list[int]]:
    """Disjoint groups of equal size, by the positions of the seeds: `GROUPS` of them, or two of two where there are few."""
    count = GROUPS if seeds >= SEEDS else 2
    order = np.random.default_rng(partition).permutation(seeds)
    size = seeds // count
    return [sorted(order[number * size : (number + 1) * size].tolist()) for number in range(count)]


def compared(seeds: Seeds, recipe: Recipe, controls: bool, device: str = "cpu") -> dict[str, Ensemble]:
    """What is judged: pools of the groups of the first partition, and for each group what the same work buys, if asked for."""
    groups, like = split(len(seeds.saes), 0), seeds.ensemble
    recipe = recipe.model_copy(update={"coefficient": like.coefficient or None})
    by = [seeds.stars(group) for group in groups]
    width = seeds.widths([found for of_group in by for found in of_group.values()])
    draws = [random_features(found["mean"], width, number) for number, found in enumerate(by)]
    first = [like.seeds[group[0]] for group in groups]
    longer = recipe.model_copy(update={"passes": recipe.passes * len(groups[0])})
    wider = recipe.model_copy(update={"d_sae": recipe.d_sae * len(groups[0])})

    def pooled(of: Representative, chosen: Sequence[Int[np.ndarray, "star"]]) -> Ensemble:
        each = zip(groups, by, chosen, strict=True)
        return joined([seeds.pooled(group, found[of].take(these), of) for group, found, these in each], like)

    def tuned(start: Ensemble) -> Ensemble:
        return _tuned(start, recipe, seeds, device)

    best = [np.arange(width)] * len(groups)
    means, medoids = pooled("mean", best), pooled("medoid", best)
    pools = {
        MEDOIDS: medoids,
        MEANS: means,
        TUNED: tuned(means),
        TUNED_MEDOIDS: tuned(medoids),
        TUNED_SINGLE: tuned(joined([seeds.saes[group[0]] for group in groups], like)),
        RANDOM: tuned(pooled("mean", draws)),
    }
    if not controls:
        return pools
    long = training.train(longer, seeds.train, first, described=LONGER, device=device)
    wide = training.train(wider, seeds.train, first, described=WIDER, device=device)
    return pools | {LONGER: long, WIDER: tuned(pruned(wide, width, seeds))}


def random_features(found: Stars, width: int, number: int) -> Int[np.ndarray, "star"]:
    """Stars of random features of the seeds: one that is met in more of them is drawn more often."""
    return np.random.default_rng(number).choice(len(found), width, replace=False, p=found.size / found.size.sum())


def _tuned(start: Ensemble, recipe: Recipe, seeds: Seeds, device: str) -> Ensemble:
    """Each SAE trained on for a while, on documents of its own, and brought to the L0 of the seeds again."""
    train, x = seeds.train, seeds.train.data[:CALIBRATION].float()
    tokens, count = round(TUNING * recipe.tokens), len(start.seeds)
    short = recipe.model_copy(update={"tokens": tokens, "passes": 1, "rate": RATE * recipe.rate, "variant": start.variant})
    parts = []
    for position in tqdm(range(count), "fine-tuning", unit="SAE", disable=None):
        begin = position * len(train) // count
        tuned = finetune(start.of(position), short, train.with_data(train.data[begin : begin + tokens]), device)
        parts.append(calibrated(tuned.dictionary(0), x, seeds.l0))
    return joined(parts, start)


def pruned(wide: Ensemble, width: int, seeds: Seeds) -> Ensemble:
    """The strongest features of each SAE, with the L0 of the seeds."""
    x, parts = seeds.train.data[:CALIBRATION].float(), []
    for position in range(len(wide.seeds)):
        sae = wide.dictionary(position)
        kept = measure(sae, x).energy.topk(width).indices.sort().values
        weights = {name: tensor if name in SHARED else tensor[kept] for name, tensor in sae.parameters._asdict().items()}
        parts.append(calibrated(replace(sae, parameters=type(sae.parameters)(**weights)), x, seeds.l0))
    return joined(parts, wide)


def shares(W_dec: Float[Tensor, "sae d_sae d_in"], energy: Float[Tensor, "sae d_sae"], threshold: float) -> pd.DataFrame:
    """One row a pair of SAEs: which share of the features of one comes back in the other, and which share of their energy.

    What has no energy does not fire, and takes no part.
    """
    matched, rows = stability(W_dec, threshold, energy > 0).matched, []
    for one, other in permutations(range(len(W_dec)), 2):
        back, weight = matched[one, other], energy[one]
        parts = {"share": back[weight > 0].double().mean(), "weighted": (back * weight).sum() / weight.sum()}
        rows.append({"one": one, "other": other} | {name: float(share) for name, share in parts.items()})
    return pd.DataFrame(rows)


def features_of(
    W_dec: Float[Tensor, "sae d_sae d_in"],
    energy: Float[Tensor, "sae d_sae"],
    frequency: Float[Tensor, "sae d_sae"],
    threshold: float,
) -> pd.DataFrame:
    """One row a feature that fires: in which share of the other SAEs it comes back, its energy and its frequency."""
    found = stability(W_dec, threshold, energy > 0)
    one, feature = np.nonzero((energy > 0).numpy())
    columns = {"back": found.probability, "energy": energy, "frequency": frequency}
    return pd.DataFrame({"one": one} | {name: values.numpy()[one, feature] for name, values in columns.items()})
