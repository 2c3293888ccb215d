"""Pools of disjoint groups of seeds, step by step (C9): all alike in width and L0. `rivals.py` has what the same work buys
otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability import threads
from sae_stability.language.activations import Activations
from sae_stability.matching import Stability, stability
from sae_stability.matching.pairs import reaches
from sae_stability.pooling import (
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
DECODER = "means, decoder fine-tuned"
POOLED: dict[str, Representative] = {MEDOIDS: "medoid", MEANS: "mean"}


@dataclass(frozen=True)
class Seeds:
    """The SAEs that are pooled, and what their features do on some training tokens."""

    ensemble: Ensemble
    saes: list[SAE]
    measured: list[Measured]
    train: Activations
    threshold: float
    groups: list[list[int]]
    """Of the first partition, by the positions of the seeds."""

    @classmethod
    def of(cls, ensemble: Ensemble, train: Activations, threshold: float, size: int | None = None) -> "Seeds":
        """Groups hold `size` seeds, or as many as `split` says."""
        saes, x = [ensemble.dictionary(position) for position in range(len(ensemble.seeds))], train.data[:CALIBRATION].float()
        return cls(ensemble, saes, [measure(sae, x) for sae in saes], train, threshold, split(len(saes), 0, size))

    @property
    def directions(self) -> Float[Tensor, "seed d_sae d_in"]:
        return self.ensemble.W_dec

    @property
    def energy(self) -> Float[Tensor, "seed d_sae"]:
        return torch.stack([of_sae.energy for of_sae in self.measured])

    @cached_property
    def alone(self) -> Stability:
        """How often features of single SAEs come back."""
        return stability(self.directions, self.threshold, self.energy > 0)

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

    def pools(self, partition: int, calibrated: float) -> Iterator[pd.DataFrame]:
        """How much pools of the groups of one partition have in common, by what stands for a star (`shares`)."""
        groups = split(len(self.saes), partition, len(self.groups[0]))[: len(self.groups)]
        by = [self.stars(group) for group in groups]
        for name, representative in POOLED.items():
            of_groups = [of_group[representative] for of_group in by]
            width, W_dec, energy = self.widths(of_groups), [], []
            for group, found in zip(groups, of_groups, strict=True):
                chosen = found.take(np.arange(width))
                W_dec.append(represent(chosen, self.directions[group], representative))
                energy.append(torch.from_numpy(chosen.energy))
            alike = stability(torch.stack(W_dec), self.threshold, torch.stack(energy) > 0)
            yield shares(alike, torch.stack(energy), calibrated).assign(product=name)

    def pooled(self, of_groups: Sequence[Stars], representative: Representative) -> Ensemble:
        """The SAEs of some stars of each group of the first partition, with the L0 of the seeds."""
        x, pools = self.train.data[:CALIBRATION].float(), []
        for group, found in zip(self.groups, of_groups, strict=True):
            pools.append(calibrated(assembled([self.saes[one] for one in group], found, representative), x, self.l0))
        return joined(pools, self.ensemble)

    def means(self) -> Ensemble:
        """The pools of means of the first partition, as they are put together."""
        by = [self.stars(group)["mean"] for group in self.groups]
        return self.pooled([found.take(np.arange(self.widths(by))) for found in by], "mean")


def split(seeds: int, partition: int, size: int | None = None) -> list[list[int]]:
    """Disjoint groups of equal size, by the positions of the seeds: of `size`, or `GROUPS` of them, or two of two where there are
    few."""
    count = seeds // size if size else (GROUPS if seeds >= SEEDS else 2)
    size, order = size or seeds // count, np.random.default_rng(partition).permutation(seeds)
    return [sorted(order[number * size : (number + 1) * size].tolist()) for number in range(count)]


def compared(seeds: Seeds, recipe: Recipe, device: str = "cpu") -> dict[str, Ensemble]:
    """Pools of the groups of the first partition, at each step, and for each group what else its seeds give."""
    by = [seeds.stars(group) for group in seeds.groups]
    width = seeds.widths([found for of_group in by for found in of_group.values()])
    best = np.arange(width)
    means, medoids = (seeds.pooled([of_group[of].take(best) for of_group in by], of) for of in ("mean", "medoid"))
    drawn = [of_group["mean"].take(random_features(of_group["mean"], width, number)) for number, of_group in enumerate(by)]
    first = joined([seeds.saes[group[0]] for group in seeds.groups], seeds.ensemble)

    def tuned(start: Ensemble, decoder_alone: bool = False) -> Ensemble:
        return fine_tuned(start, recipe, seeds, device, decoder_alone)

    return {
        MEDOIDS: medoids,
        MEANS: means,
        DECODER: tuned(means, decoder_alone=True),
        TUNED: tuned(means),
        TUNED_MEDOIDS: tuned(medoids),
        TUNED_SINGLE: tuned(first),
        RANDOM: tuned(seeds.pooled(drawn, "mean")),
    }


def random_features(found: Stars, width: int, number: int) -> Int[np.ndarray, "star"]:
    """Stars of random features of the seeds: one that is met in more of them is drawn more often."""
    return np.random.default_rng(number).choice(len(found), width, replace=False, p=found.size / found.size.sum())


def fine_tuned(start: Ensemble, recipe: Recipe, seeds: Seeds, device: str, decoder_alone: bool = False) -> Ensemble:
    """Each SAE trained on for a while, and brought to the L0 of the seeds again: on documents of its own where there are."""
    train, x = seeds.train, seeds.train.data[:CALIBRATION].float()
    tokens, count = round(TUNING * recipe.tokens), len(start.seeds)
    short = recipe.model_copy(update={"tokens": tokens, "passes": 1, "rate": RATE * recipe.rate, "variant": start.variant})

    def tuned(position: int) -> SAE:
        begin = position * (len(train) - tokens) // max(1, count - 1)
        own = train.with_data(train.data[begin : begin + tokens])
        return calibrated(finetune(start.of(position), short, own, device, decoder_alone).dictionary(0), x, seeds.l0)

    return joined(threads.each_seed(tuned, count, "fine-tuning", one_at_a_time=device != "cpu"), start)


def shares(alike: Stability, energy: Float[Tensor, "sae d_sae"], calibrated: float) -> pd.DataFrame:
    """One row a pair of SAEs, of what one has that comes back in the other: which share of its features at the threshold (`share`)
    and at the calibrated one, which share of their energy (`weighted`), and their best cosines in the mean."""
    matched, rows = alike.matched, []
    for one, other in permutations(range(len(energy)), 2):
        live, weight = alike.alive[one], energy[one]
        back, cosine = matched[one, other], alike.best_cosine[one, other][live]
        at_calibrated = torch.nan if np.isnan(calibrated) else reaches(cosine, calibrated).double().mean()
        parts = {"share": back[live].double().mean(), "calibrated": at_calibrated, "cosine": cosine.double().mean()}
        parts["weighted"] = (back * weight).sum() / weight.sum()
        rows.append({"one": one, "other": other} | {name: float(share) for name, share in parts.items()})
    return pd.DataFrame(rows)


def in_singles(
    W_dec: Float[Tensor, "pool d_pool d_in"], energy: Float[Tensor, "pool d_pool"], seeds: Seeds
) -> Float[np.ndarray, "pool group"]:
    """Which share of the features of the pool of each group comes back in a single SAE of each other one, on average over its
    seeds."""
    found = np.full((len(W_dec), len(seeds.groups)), np.nan)
    directions = F.normalize(seeds.directions, dim=2) * (seeds.energy > 0)[:, :, None]
    for pool, (rows, alive) in enumerate(zip(F.normalize(W_dec, dim=2), energy > 0, strict=True)):
        for number, group in enumerate(seeds.groups):
            if number != pool:
                best = torch.stack([(rows[alive] @ directions[one].T).amax(1) for one in group])
                found[pool, number] = float(reaches(best, seeds.threshold).double().mean())
    return found


def lost(pools: Float[Tensor, "pool d_pool d_in"], alive: Bool[Tensor, "pool d_pool"], seeds: Seeds) -> pd.DataFrame:
    """One row a seed of a group: which share of its features, and of their energy, has no place in the group's pool, and in which
    share of the seeds of other groups such a feature comes back."""
    matched, rows = seeds.alone.matched, []
    for number, group in enumerate(seeds.groups):
        kept = F.normalize(pools[number][alive[number]], dim=1)
        elsewhere = [one for other in seeds.groups if other is not group for one in other]
        for one in group:
            live, energy = seeds.energy[one] > 0, seeds.energy[one]
            away = live & ~reaches((F.normalize(seeds.directions[one], dim=1) @ kept.T).amax(1), seeds.threshold)
            back = matched[one, elsewhere][:, away].double().mean()
            parts = {"share": away.sum() / live.sum(), "energy": energy[away].sum() / energy.sum(), "back": back}
            rows.append({"group": number, "seed": one} | {name: float(value) for name, value in parts.items()})
    return pd.DataFrame(rows)


def features_of(alike: Stability, energy: Float[Tensor, "sae d_sae"], frequency: Float[Tensor, "sae d_sae"]) -> pd.DataFrame:
    """One row a feature that fires: in which share of the other SAEs it comes back, its energy and its frequency."""
    one, feature = np.nonzero(alike.alive.numpy())
    columns = {"back": alike.probability, "energy": energy, "frequency": frequency}
    return pd.DataFrame({"one": one} | {name: values.numpy()[one, feature] for name, values in columns.items()})
