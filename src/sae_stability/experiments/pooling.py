"""Is one SAE out of several seeds more stable, and as good (C9)? Pools of disjoint groups, and what else the same work buys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.numpy import load_file
from torch import Tensor
from tqdm import tqdm

from sae_stability import evaluation, training
from sae_stability.experiments import ensembles, quality, texts
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import save_arrays, write_table
from sae_stability.language.activations import Activations
from sae_stability.ledger import NOWHERE, OTHERWISE, Condition, Rule, judged
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
from sae_stability.statistics import Interval, bootstrap_ratio, difference, jackknifed_mean, matched_pairs, over_pairs
from sae_stability.study import Cell, Recipe, Study
from sae_stability.training.finetuning import finetune

NOISE_SEEDS = 4
"""Of the surrogate, from which there are two groups of two."""
GROUPS = 3
"""Disjoint groups that the seeds are split into; what is left over is held out."""
SEEDS = 6
"""From which there are three groups of two."""
PARTITIONS = 20
"""Ways to split the seeds, over which stability is averaged."""
CALIBRATION = 50_000
"""Training tokens on which energies are measured and pools are brought to the L0 of their SAEs."""
JUDGED = 200_000
"""Held-out tokens on which all are judged."""
TUNING = 0.1
"""Tokens of the fine-tuning, as a share of those of the training."""
CALIPER = 0.05
RATE = 1 / 3
"""Its peak rate over that of the training. Share and rate were chosen on the main cell of `embedded`."""
LOSS = -0.01
"""Explained variance, or loss recovered, less that of single SAEs, above which a pool preserves it."""

SINGLE, MEDOIDS, MEANS = "single", "medoids", "means"
TUNED, TUNED_MEDOIDS = "means, fine-tuned", "medoids, fine-tuned"
TUNED_SINGLE, RANDOM = "single, fine-tuned", "random features, fine-tuned"
LONGER, WIDER = "longer training", "wider, pruned, fine-tuned"
NOISE, NOISE_SINGLE = "surrogate, means", "surrogate, single"
EXPLAINED, RECOVERED = "explained variance", "loss recovered"
POOLED: dict[str, Representative] = {MEDOIDS: "medoid", MEANS: "mean"}
CONTROLS = (TUNED_SINGLE, TUNED_MEDOIDS, RANDOM, LONGER, WIDER)
"""What costs as much as a pool, or has as much fine-tuning."""
SUPPORTED = "supported in this model if the 95 % intervals lie"

C9 = (
    Rule(
        "C9",
        "share of the features of a pool that come back in the pool of other seeds, less that of single SAEs in one another; each "
        "pool is of a third of the seeds, has as many features and the same L0, and is fine-tuned on a tenth of the tokens",
        f"{SUPPORTED} above 0 for the statistic, and above {LOSS:g} for explained variance and for loss recovered, less those of "
        f"single SAEs; {OTHERWISE}",
    ),
    Rule(
        "C9",
        "share of the features of a pool that come back in the pool of other seeds, less that of the most stable of what costs as "
        "much, SAEs trained as many times as long and wider SAEs that are pruned, or is fine-tuned alike, single SAEs and "
        "random features of the same seeds",
        f"{SUPPORTED} above 0 for the difference from each of these, and above {LOSS:g} in explained variance; {OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C9",
        "share of the features of a pool that come back in the pools of other seeds, less that of features of a single SAE "
        "that are alike in energy and frequency, in other single SAEs",
        f"{SUPPORTED} above 0 for the statistic; {OTHERWISE}",
        "beyond energy and frequency",
    ),
)


def compute(results: Results, folder: Path) -> None:
    """Pool disjoint groups of seeds and train what they are compared with; judge all on the same held-out text."""
    ensemble = ensembles.ensemble(results)
    if len(ensemble.seeds) < SEEDS:  # some diverged
        return
    seeds = _Seeds.of(ensemble, texts.activations(results, "train"), results.cell.threshold)
    pairs = []
    for partition in tqdm(range(1, PARTITIONS), "pools", unit="partition", disable=None):  # pools of the first are judged
        pairs += [each.assign(partition=partition) for each in seeds.pools(partition)]
    noise = ensembles.ensemble(results, "surrogate")
    of_noise = _Seeds.of(noise, texts.activations(results, "train", "surrogate"), results.cell.threshold)
    pairs.append(_shares(of_noise.directions, of_noise.energy, seeds.threshold).assign(product=NOISE_SINGLE, partition=0))
    for partition in range(PARTITIONS if len(of_noise.saes) >= NOISE_SEEDS else 0):
        pools = pd.concat(of_noise.pools(partition))
        pairs.append(pools[pools["product"] == MEANS].assign(product=NOISE, partition=partition))

    products = {SINGLE: ensemble} | _products(seeds, results.cell.recipe, results.study.pool_controls, results.study.device)
    held_out, contexts = texts.activations(results, "evaluation").first(JUDGED), texts.contexts(results, "evaluation")
    x, arrays, features = held_out.data[:CALIBRATION].float(), dict[str, np.ndarray](), []
    for name, product in products.items():
        fit = evaluation.fit(product, held_out, contexts.cluster[contexts.is_text])
        arrays |= {f"{name}/firings": fit.firings.numpy(), f"{name}/residual": fit.residual}
        measured = [measure(product.dictionary(one), x) for one in range(len(product.seeds))]
        energy = torch.stack([of_sae.energy for of_sae in measured])
        pairs.append(_shares(product.W_dec, energy, seeds.threshold).assign(product=name, partition=0))
        if name in (SINGLE, TUNED):
            frequency = torch.stack([of_sae.firings for of_sae in measured]) / len(x)
            features.append(_features(product.W_dec, energy, frequency, seeds.threshold).assign(product=name))
    singles = quality.losses(results)
    pool = evaluation.losses(texts.reading(results, results.study.loss_tokens), products[TUNED])
    arrays |= {"total": fit.total, "rows": np.array(fit.rows), "clean": singles.clean, "zero": singles.zero}
    arrays |= {f"{SINGLE}/spliced": singles.spliced, f"{TUNED}/spliced": pool.spliced}
    save_arrays(folder / "judged.safetensors", arrays)
    write_table(folder / "pairs.parquet", pd.concat(pairs, ignore_index=True))
    write_table(folder / "features.parquet", pd.concat(features, ignore_index=True))


@dataclass(frozen=True)
class _Seeds:
    """The SAEs that are pooled, and what their features do on some training tokens."""

    ensemble: Ensemble
    saes: list[SAE]
    measured: list[Measured]
    train: Activations
    threshold: float

    @classmethod
    def of(cls, ensemble: Ensemble, train: Activations, threshold: float) -> "_Seeds":
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
            yield _shares(torch.stack(W_dec), torch.stack(energy), self.threshold).assign(product=name)

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


def _products(seeds: _Seeds, recipe: Recipe, controls: bool, device: str = "cpu") -> dict[str, Ensemble]:
    """What is judged: pools of the groups of the first partition, and for each group what the same work buys, if asked for."""
    groups, like = split(len(seeds.saes), 0), seeds.ensemble
    recipe = recipe.model_copy(update={"coefficient": like.coefficient or None})
    by = [seeds.stars(group) for group in groups]
    width = seeds.widths([found for of_group in by for found in of_group.values()])
    draws = [_random_features(found["mean"], width, number) for number, found in enumerate(by)]
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
    return pools | {LONGER: long, WIDER: tuned(_pruned(wide, width, seeds))}


def _random_features(found: Stars, width: int, number: int) -> Int[np.ndarray, "star"]:
    """Stars of random features of the seeds: one that is met in more of them is drawn more often."""
    return np.random.default_rng(number).choice(len(found), width, replace=False, p=found.size / found.size.sum())


def _tuned(start: Ensemble, recipe: Recipe, seeds: _Seeds, device: str) -> Ensemble:
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


def _pruned(wide: Ensemble, width: int, seeds: _Seeds) -> Ensemble:
    """The strongest features of each SAE, with the L0 of the seeds."""
    x, parts = seeds.train.data[:CALIBRATION].float(), []
    for position in range(len(wide.seeds)):
        sae = wide.dictionary(position)
        kept = measure(sae, x).energy.topk(width).indices.sort().values
        weights = {name: tensor if name in SHARED else tensor[kept] for name, tensor in sae.parameters._asdict().items()}
        parts.append(calibrated(replace(sae, parameters=type(sae.parameters)(**weights)), x, seeds.l0))
    return joined(parts, wide)


def _shares(W_dec: Float[Tensor, "sae d_sae d_in"], energy: Float[Tensor, "sae d_sae"], threshold: float) -> pd.DataFrame:
    """One row a pair of SAEs: which share of the features of one comes back in the other, and which share of their energy.

    What has no energy does not fire, and takes no part.
    """
    matched, rows = stability(W_dec, threshold, energy > 0).matched, []
    for one, other in permutations(range(len(W_dec)), 2):
        back, weight = matched[one, other], energy[one]
        shares = {"share": back[weight > 0].double().mean(), "weighted": (back * weight).sum() / weight.sum()}
        rows.append({"one": one, "other": other} | {name: float(share) for name, share in shares.items()})
    return pd.DataFrame(rows)


def _features(
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


def products(results: Results) -> pd.DataFrame:
    """One row per product: a pool, or what it is compared with.

    `share` and `weighted` say how many features, and how much of the energy, come back in the same product of other seeds;
    `explained` and `recovered` are explained variance and loss recovered; `trained` is what one costs, in trainings of one SAE.
    """
    if not (results.folder("pooling") / "pairs.parquet").is_file():
        return pd.DataFrame(columns=["product"])
    found, rows = _Judged.of(results), []
    for name in found.names:
        row = {"product": name, "saes": found.saes(name), "trained": found.trained(name)}
        row |= (
            {"of_first": found.first(name)}
            | interval_columns("share", found.share(name))
            | interval_columns("weighted", found.share(name, "weighted"))
        )
        if name in found.judged:
            firings, rows_read = found.arrays[f"{name}/firings"], int(found.arrays["rows"])
            row |= {"features": firings.shape[1], "dead": float((firings == 0).mean())}
            row |= {"l0": float(firings.sum() / rows_read / len(firings))}
            row |= interval_columns("explained", found.quality(name))
        if f"{name}/spliced" in found.arrays:
            row |= interval_columns("recovered", found.quality(name, RECOVERED))
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Judged:
    """What was found of all products."""

    pairs: pd.DataFrame
    features: pd.DataFrame
    arrays: dict[str, np.ndarray]
    seeds: int
    surrogate_seeds: int

    @classmethod
    def of(cls, results: Results) -> "_Judged":
        folder = results.folder("pooling")
        pairs, features = (pd.read_parquet(folder / f"{name}.parquet") for name in ("pairs", "features"))
        seeds, surrogate_seeds = (len(results.cell.seeds_of(kind)) for kind in ("real", "surrogate"))
        return cls(pairs, features, load_file(folder / "judged.safetensors"), seeds, surrogate_seeds)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.judged, *self.pairs["product"]]))

    @property
    def judged(self) -> list[str]:
        return [name.removesuffix("/firings") for name in self.arrays if name.endswith("/firings")]

    def saes(self, name: str) -> int:
        return int(self.pairs.loc[self.pairs["product"] == name, "one"].max() + 1)

    def trained(self, name: str) -> float:
        """What one SAE of a product costs, in trainings of a single one."""
        size = len(split(self.surrogate_seeds if name == NOISE else self.seeds, 0)[0])
        tuning = TUNING if "fine-tuned" in name else 0
        return tuning + (size if name not in (SINGLE, TUNED_SINGLE, NOISE_SINGLE) else 1)

    def share(self, name: str, column: str = "share") -> Interval:
        """Of the features, or of their energy, that come back: jackknifed over groups, and averaged over partitions."""
        intervals = []
        for _, of_partition in self.pairs[self.pairs["product"] == name].groupby("partition"):
            values = np.full((self.saes(name),) * 2, np.nan)
            values[of_partition["one"], of_partition["other"]] = of_partition[column]
            intervals.append(over_pairs(values))
        value, low, high = np.mean([(each.value, each.low, each.high) for each in intervals], axis=0)
        return Interval(float(value), float(low), float(high)).within(0, 1)

    def first(self, name: str) -> float:
        """What comes back in the first partition, of which all products are."""
        return float(self.pairs.loc[(self.pairs["product"] == name) & (self.pairs["partition"] == 0), "share"].mean())

    def more(self, name: str, column: str = "share") -> Interval:
        """How much more of the fine-tuned pools comes back than of another product: paired by group, but for single SAEs."""
        if self.saes(name) != self.saes(TUNED):
            return difference(self.share(TUNED, column), self.share(name, column))
        return over_pairs(self._of_first(TUNED, column) - self._of_first(name, column))

    def _of_first(self, name: str, column: str) -> Float[np.ndarray, "sae sae"]:
        rows, values = (
            self.pairs[(self.pairs["product"] == name) & (self.pairs["partition"] == 0)],
            np.full((self.saes(name),) * 2, np.nan),
        )
        values[rows["one"], rows["other"]] = rows[column]
        return values

    def matched(self) -> Interval:
        """How much more often features of the fine-tuned pools come back than features of a single SAE that have their energy and
        frequency: one pool and one SAE at a time, one to one, within `CALIPER` standard deviations of both logarithms."""
        pools, singles = (self.features[self.features["product"] == name] for name in (TUNED, SINGLE))
        spread = np.log(singles[["energy", "frequency"]]).std().to_numpy()
        more = []
        for group, pool in pools.groupby("one"):
            single = singles[singles["one"] == split(self.seeds, 0)[group][0]]
            ours, theirs = (np.log(each[["energy", "frequency"]].to_numpy()) / spread for each in (pool, single))
            paired, with_them = matched_pairs(ours, theirs, CALIPER)
            more.append(float(pool["back"].to_numpy()[paired].mean() - single["back"].to_numpy()[with_them].mean()))
        return jackknifed_mean(more)

    def quality(self, name: str, of: str = EXPLAINED, less: str | None = None) -> Interval:
        """Explained variance, or loss recovered, less that of another product: over its SAEs, and over clusters of the text."""
        value = self._over_saes(name, of)
        if less is not None and self.saes(name) == self.saes(less):
            value = jackknifed_mean((self._lost(less, of) - self._lost(name, of)).sum(1) / self._whole(of).sum())
        elif less is not None:
            value = difference(value, self._over_saes(less, of))
        lost = self._lost(name, of).mean(0) - (self._lost(less, of).mean(0) if less is not None else 0)
        text = bootstrap_ratio(lost, self._whole(of))
        return value.widened((text.high - text.low) / 2)

    def _over_saes(self, name: str, of: str) -> Interval:
        return jackknifed_mean(1 - self._lost(name, of).sum(1) / self._whole(of).sum())

    def _lost(self, name: str, of: str) -> Float[np.ndarray, "sae cluster"]:
        """What each SAE loses: squared error, or cross-entropy."""
        return self.arrays[f"{name}/residual"] if of == EXPLAINED else self.arrays[f"{name}/spliced"] - self.arrays["clean"]

    def _whole(self, of: str) -> Float[np.ndarray, "cluster"]:
        """What there is to lose."""
        return self.arrays["total"] if of == EXPLAINED else self.arrays["zero"] - self.arrays["clean"]


def judge(results: Results) -> list[dict]:
    if not (results.folder("pooling") / "pairs.parquet").is_file():
        return []
    return judge_c9(_Judged.of(results))


def judge_c9(found: _Judged) -> list[dict]:
    """C9, from what was found of all products; the second line where what costs as much was trained.

    The null's value of the first line is what pools of the surrogate win.
    """
    stated, beyond_noise, beyond_energy = C9
    won, matched = found.more(SINGLE), found.matched()
    noise = difference(found.share(NOISE), found.share(NOISE_SINGLE)) if NOISE in found.names else NOWHERE
    lines = [
        judged(
            stated,
            won,
            noise,
            [
                Condition("features that come back, pool less single", won, 0.0),
                Condition("explained variance, pool less single", found.quality(TUNED, EXPLAINED, SINGLE), LOSS, no_effect=-1.0),
                Condition("loss recovered, pool less single", found.quality(TUNED, RECOVERED, SINGLE), LOSS, no_effect=-1.0),
            ],
        ),
        judged(
            beyond_energy, matched, NOWHERE, [Condition("features that come back, at equal energy and frequency", matched, 0.0)]
        ),
    ]
    if set(CONTROLS) <= set(found.names):
        over = {name: found.more(name) for name in CONTROLS}
        least = min(over.values(), key=lambda interval: interval.value)
        conditions = [Condition(f"features that come back, pool less {name}", interval, 0.0) for name, interval in over.items()]
        conditions += [
            Condition(f"explained variance, pool less {name}", found.quality(TUNED, EXPLAINED, name), LOSS, no_effect=-1.0)
            for name in CONTROLS
        ]
        lines.insert(1, judged(beyond_noise, least, NOWHERE, conditions))
    return lines


def _asked(study: Study, cell: Cell) -> bool:
    can = cell.variant != "matryoshka" and not study.stream  # their pools are of another variant; a stream keeps nothing to tune on
    return is_main(study, cell) and can and len(cell.seed_list) >= SEEDS and "surrogate" in cell.nulls


EXPERIMENT = Experiment(
    "pooling",
    compute,
    after=("quality",),
    reads=("threshold", "evaluation_tokens", "loss_tokens", "pool_controls"),
    tables={"pools": products},
    claims=judge,
    asked=_asked,
)
