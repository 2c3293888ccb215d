"""Is one SAE out of several seeds more stable, and as good (C9)? Pools of disjoint groups, and what else the same work buys."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.numpy import load_file
from torch import Tensor

from sae_stability import evaluation, threads
from sae_stability.ablation import impact_on_prediction
from sae_stability.evaluation import sparse_codes
from sae_stability.experiments import ensembles, rivals, texts, triggers
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.pools import (
    CALIBRATION,
    GROUPS,
    MEANS,
    RANDOM,
    SEEDS,
    SINGLE,
    TUNED,
    TUNED_MEDOIDS,
    TUNED_SINGLE,
    TUNING,
    Seeds,
    compared,
    features_of,
    fine_tuned,
    in_singles,
    lost,
    shares,
    split,
)
from sae_stability.experiments.rivals import BAGGED, BOOSTED, LONGER, PAID, WIDER
from sae_stability.experiments.stability import NULL_SHARE
from sae_stability.files import save_arrays, write_table
from sae_stability.language.activations import Activations
from sae_stability.ledger import NOWHERE, OTHERWISE, Condition, Rule, judged
from sae_stability.matching import Stability, calibrate, stability
from sae_stability.pooling import measure
from sae_stability.saes.ensemble import Ensemble
from sae_stability.statistics import Interval, bootstrap_ratio, difference, jackknifed_mean, matched_pairs, over_pairs
from sae_stability.store import SCRATCH
from sae_stability.study import Cell, Study
from sae_stability.triggers import SURFACE
from sae_stability.triggers import triggers as ask

NOISE_SEEDS = 4
"""Of the surrogate, from which there are two groups of two."""
PARTITIONS = 20
"""Ways to split the seeds, over which stability is averaged."""
JUDGED = 100_000
"""Held-out tokens on which all are judged."""
CALIPER = 0.05
LOSS = -0.01
"""Explained variance, or loss recovered, less that of single SAEs, above which a pool preserves it."""

NOISE, NOISE_SINGLE, NOISE_TUNED = "surrogate, means", "surrogate, single", "surrogate, means, fine-tuned"
EXPLAINED, RECOVERED = "explained variance", "loss recovered"
CONTROLS = (TUNED_SINGLE, TUNED_MEDOIDS, RANDOM, LONGER, WIDER)
"""What costs as much as a pool, or has as much fine-tuning."""
SUPPORTED = "supported in this model if the 95 % intervals lie"

C9 = (
    Rule(
        "C9",
        "share of the features of a pool that come back in the pool of other seeds, less that of the single SAEs of the one in "
        "those of the other; each pool has as many features as an SAE and the same L0, and is fine-tuned on a tenth of the tokens",
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
    ensemble, noise = ensembles.ensemble(results), ensembles.ensemble(results, "surrogate")
    if len(ensemble.seeds) < max(SEEDS, GROUPS * (results.study.pool_size or 0)):  # some diverged
        return
    recipe, threshold, size, device = results.cell.recipe, results.cell.threshold, results.study.pool_size, results.study.device
    seeds = Seeds.of(ensemble, texts.activations(results, "train"), threshold, size)
    noise_size = len(noise_groups(len(noise.seeds), size)[0])
    of_noise = Seeds.of(noise, texts.activations(results, "train", "surrogate"), threshold, noise_size)
    calibrated = calibrate(seeds.alone, of_noise.alone, NULL_SHARE).threshold
    pairs = [shares(of_noise.alone, of_noise.energy, calibrated).assign(product=NOISE_SINGLE, partition=0)]

    scratch = folder / SCRATCH

    def pooled_in(partition: int) -> pd.DataFrame:
        kept = scratch / f"partition-{partition}.parquet"
        if not kept.is_file():
            write_table(kept, pd.concat(seeds.pools(partition, calibrated)).assign(partition=partition))
        return pd.read_parquet(kept)

    pairs += threads.each_seed(lambda number: pooled_in(number + 1), PARTITIONS - 1, "pools")  # pools of the first are judged
    if len(of_noise.saes) >= NOISE_SEEDS:
        for partition in range(PARTITIONS):
            pools = pd.concat(of_noise.pools(partition, calibrated))
            pairs.append(pools[pools["product"] == MEANS].assign(product=NOISE, partition=partition))
        pooled = fine_tuned(of_noise.means(), recipe, of_noise, device)
        alike, energy, _ = _compared(pooled, of_noise)
        pairs.append(shares(alike, energy, calibrated).assign(product=NOISE_TUNED, partition=0))

    products = {SINGLE: ensemble} | compared(seeds, recipe, device)
    if results.study.pool_controls:
        products |= rivals.trained(seeds, recipe, products[TUNED].d_sae, device, scratch)
    held_out, contexts = texts.activations(results, "evaluation").first(JUDGED), texts.contexts(results, "evaluation")
    cluster, arrays = contexts.cluster[contexts.is_text], dict[str, np.ndarray]()
    features = []
    for name, product in products.items():
        fit = evaluation.fit(product, held_out, cluster)
        arrays |= {f"{name}/firings": fit.firings.numpy(), f"{name}/residual": fit.residual, "total": fit.total}
        alike, energy, frequency = _compared(product, seeds, held_out)
        pairs.append(shares(alike, energy, calibrated).assign(product=name, partition=0))
        if name in (SINGLE, TUNED):
            features.append(features_of(alike, energy, frequency).assign(product=name))
        if name == TUNED:
            arrays["in singles"] = in_singles(product.W_dec, energy, seeds)
            write_table(folder / "lost.parquet", lost(product.W_dec, alike.alive, seeds))
    if results.study.pool_controls:
        chains = {BAGGED: rivals.bagged(seeds), BOOSTED: rivals.boosted(seeds, recipe, device, scratch)}
        for name, sums in chains.items():
            fit = rivals.fit(sums, held_out, cluster, ensemble)
            energy = torch.stack([chain.energy(held_out.data.float()) for chain in sums])
            arrays |= {f"{name}/firings": fit.firings.numpy(), f"{name}/residual": fit.residual}
            alike = stability(torch.stack([chain.directions for chain in sums]), threshold, energy > 0)
            pairs.append(shares(alike, energy, calibrated).assign(product=name, partition=0))
        write_table(folder / "doing.parquet", _doing(results, products, seeds))

    site = texts.reading(results, results.study.loss_tokens)
    arrays["rows"] = np.array(len(held_out))
    for name in (SINGLE, TUNED):
        losses = evaluation.losses(site, products[name])
        arrays |= {"clean": losses.clean, "zero": losses.zero, f"{name}/spliced": losses.spliced}
    save_arrays(folder / "judged.safetensors", arrays)
    write_table(folder / "pairs.parquet", pd.concat(pairs, ignore_index=True))
    write_table(folder / "features.parquet", pd.concat(features, ignore_index=True))


def _compared(
    product: Ensemble, seeds: Seeds, held_out: Activations | None = None
) -> tuple[Stability, Float[Tensor, "sae d_sae"], Float[Tensor, "sae d_sae"]]:
    """How often the features of SAEs come back in one another, and the energy and frequency of each on held-out text, or else on
    the training text."""
    x = (held_out or seeds.train).data[:CALIBRATION].float()
    measured = [measure(product.dictionary(one), x) for one in range(len(product.seeds))]
    energy, firings = (torch.stack([getattr(of_sae, what) for of_sae in measured]) for what in ("energy", "firings"))
    return stability(product.W_dec, seeds.threshold, energy > 0), energy, firings / len(x)


def _doing(results: Results, products: dict[str, Ensemble], seeds: Seeds) -> pd.DataFrame:
    """One row per single SAE that heads a group, and per pool: what its live features do to the cross-entropy alone, in nats a
    token, in the mean and the median, and which share of them fires on surface form."""
    site, (held_out, text, words, frequency) = texts.reading(results, results.study.loss_tokens), triggers.reading(results)
    rows = []
    for name, positions in ((SINGLE, [group[0] for group in seeds.groups[:PAID]]), (TUNED, range(len(seeds.groups[:PAID])))):
        for position in positions:
            alone = products[name].of(position)
            (codes,) = sparse_codes(alone, held_out)
            live = np.bincount(codes.indices, minlength=codes.shape[1]) > 0
            impact = impact_on_prediction(site, alone)
            of_each = (impact.first_order + impact.second_order)[0].numpy()[live]
            surface = ask(codes, text, words, frequency)["trigger"].isin(SURFACE)[live]
            row = {"product": name, "mean": of_each.mean(), "median": np.median(of_each), "surface": surface.mean()}
            rows.append({key: value if key == "product" else float(value) for key, value in row.items()})
    return pd.DataFrame(rows)


def products(results: Results) -> pd.DataFrame:
    """One row per product: a pool, or what it is compared with.

    `share` and `weighted` say how many features, and how much of the energy, come back in the same product of other seeds,
    `calibrated` how many do at the calibrated threshold; `cosine` is their best cosine in the mean. `in_singles` says how many come
    back in single SAEs of other groups. `explained` and `recovered` are explained variance and loss recovered; `trained` is what
    one costs, in trainings of one SAE. `impact` and `impact_median` are what a live feature alone does to the cross-entropy, in
    nats a token, and `surface` is the share that fires on surface form.
    """
    if not (results.folder("pooling") / "pairs.parquet").is_file():
        return pd.DataFrame(columns=["product"])
    found, rows = _Judged.of(results), []
    for name in found.names:
        row: dict = {"product": name, "saes": found.saes(name), "trained": found.trained(name), "of_first": found.first(name)}
        for column in ("share", "weighted", "calibrated", "cosine"):
            row |= interval_columns(column, found.share(name, column))
        if name in found.judged:
            firings, rows_read = found.arrays[f"{name}/firings"], int(found.arrays["rows"])
            row |= {"features": firings.shape[1], "dead": float((firings == 0).mean())}
            row |= {"l0": float(firings.sum() / rows_read / len(firings))}
            row |= interval_columns("explained", found.quality(name))
        if f"{name}/spliced" in found.arrays:
            row |= interval_columns("recovered", found.quality(name, RECOVERED))
            row |= interval_columns("in_singles", over_pairs(found.in_singles(name)))
        doing = found.doing[found.doing["product"] == name] if len(found.doing) else found.doing
        for column, of in (("impact", "mean"), ("impact_median", "median"), ("surface", "surface")) if len(doing) else ():
            row |= interval_columns(column, jackknifed_mean(doing[of]))
        rows.append(row)
    return pd.DataFrame(rows)


def lost_features(results: Results) -> pd.DataFrame:
    """What a pool lacks of its seeds: which share of their features (`share`) and of their energy has no place in it, and in which
    share of the seeds of other groups these come back (`back`)."""
    if not (results.folder("pooling") / "lost.parquet").is_file():
        return pd.DataFrame(columns=["share"])
    of_groups = pd.read_parquet(results.folder("pooling") / "lost.parquet").groupby("group").mean()
    row: dict[str, float] = {}
    for column in ("share", "energy", "back"):
        row |= interval_columns(column, jackknifed_mean(of_groups[column]))
    return pd.DataFrame([row])


@dataclass(frozen=True)
class _Judged:
    """What was found of all products."""

    pairs: pd.DataFrame
    features: pd.DataFrame
    arrays: dict[str, np.ndarray]
    doing: pd.DataFrame
    groups: list[list[int]]
    """The seeds of each pool, by their positions."""
    noise_size: int
    """Seeds of each pool of the surrogate."""

    @classmethod
    def of(cls, results: Results) -> "_Judged":
        folder, size = results.folder("pooling"), results.study.pool_size
        pairs, features = (pd.read_parquet(folder / f"{name}.parquet") for name in ("pairs", "features"))
        doing = pd.read_parquet(folder / "doing.parquet") if (folder / "doing.parquet").is_file() else pd.DataFrame()
        arrays = load_file(folder / "judged.safetensors")
        surrogates = int(pairs.loc[pairs["product"] == NOISE_SINGLE, "one"].max() + 1)
        groups = split(len(arrays[f"{SINGLE}/firings"]), 0, size)
        return cls(pairs, features, arrays, doing, groups, len(noise_groups(surrogates, size)[0]))

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
        tuning = TUNING if "fine-tuned" in name else 0
        if name in (SINGLE, TUNED_SINGLE, NOISE_SINGLE):
            return 1 + tuning
        return tuning + (self.noise_size if name in (NOISE, NOISE_TUNED) else len(self.groups[0]))

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

    def more(self, name: str) -> Interval:
        """How much more of the fine-tuned pools comes back than of another product: paired by group, where it has one of each."""
        ours, theirs = self._of_first(TUNED), self._of_first(name)
        if len(ours) != len(theirs):
            return difference(self.share(TUNED), self.share(name))
        return over_pairs(ours - theirs)

    def more_in_singles(self) -> Interval:
        """How much more of the fine-tuned pools comes back in single SAEs of other groups than of the single SAEs of their own."""
        return over_pairs(self.in_singles(TUNED) - self.in_singles(SINGLE))

    def in_singles(self, name: str) -> Float[np.ndarray, "group group"]:
        """How much of the fine-tuned pools, or of single SAEs, comes back in single SAEs of another group."""
        return self.arrays["in singles"] if name == TUNED else self._of_first(SINGLE)

    def _of_first(self, name: str) -> Float[np.ndarray, "group group"]:
        """What comes back in the first partition; of single SAEs the mean over those of two groups."""
        rows = self.pairs[(self.pairs["product"] == name) & (self.pairs["partition"] == 0)]
        values = np.full((self.saes(name),) * 2, np.nan)
        values[rows["one"], rows["other"]] = rows["share"]
        if name != SINGLE:
            return values
        of_groups = np.array([[values[np.ix_(one, other)].mean() for other in self.groups] for one in self.groups])
        np.fill_diagonal(of_groups, np.nan)
        return of_groups

    def matched(self) -> Interval:
        """How much more often features of the fine-tuned pools come back than features of a single SAE that have their energy and
        frequency: one pool and one SAE at a time, one to one, within `CALIPER` standard deviations of both logarithms."""
        pools, singles = (self.features[self.features["product"] == name] for name in (TUNED, SINGLE))
        spread = np.log(singles[["energy", "frequency"]]).std().to_numpy()
        more = []
        for group, pool in pools.groupby("one"):
            single = singles[singles["one"] == self.groups[group][0]]
            ours, theirs = (np.log(each[["energy", "frequency"]].to_numpy()) / spread for each in (pool, single))
            paired, with_them = matched_pairs(ours, theirs, CALIPER)
            more.append(float(pool["back"].to_numpy()[paired].mean() - single["back"].to_numpy()[with_them].mean()))
        return jackknifed_mean(more)

    def quality(self, name: str, of: str = EXPLAINED, less: str | None = None) -> Interval:
        """Explained variance, or loss recovered, less that of another product: over its SAEs, paired by group where that has one of
        each, and over clusters of the text."""
        lost, whole = self._lost(name, of), self._whole(of)
        value, on_text = jackknifed_mean(1 - lost.sum(1) / whole.sum()), lost.mean(0)
        if less is not None:
            theirs = self._lost(less, of)
            if less == SINGLE:
                theirs = np.stack([theirs[group].mean(0) for group in self.groups])
            on_text = on_text - theirs.mean(0)
            if len(theirs) == len(lost):
                value = jackknifed_mean((theirs - lost).sum(1) / whole.sum())
            else:
                value = difference(value, jackknifed_mean(1 - theirs.sum(1) / whole.sum()))
        text = bootstrap_ratio(on_text, whole)
        return value.widened((text.high - text.low) / 2)

    def _lost(self, name: str, of: str) -> Float[np.ndarray, "sae cluster"]:
        """What each SAE loses: squared error, or cross-entropy."""
        return self.arrays[f"{name}/residual"] if of == EXPLAINED else self.arrays[f"{name}/spliced"] - self.arrays["clean"]

    def _whole(self, of: str) -> Float[np.ndarray, "cluster"]:
        """What there is to lose."""
        return self.arrays["total"] if of == EXPLAINED else self.arrays["zero"] - self.arrays["clean"]


def noise_groups(seeds: int, size: int | None) -> list[list[int]]:
    """Of the surrogate's seeds: of the size of the model's pools where there are two such, and otherwise as many as there are seeds
    for."""
    return split(seeds, 0, size if size and seeds >= 2 * size else None)


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
    here = is_main(study, cell) or study.pool_controls  # a study of pools asks everywhere
    return here and can and len(cell.seed_list) >= SEEDS and "surrogate" in cell.nulls


EXPERIMENT = Experiment(
    "pooling",
    compute,
    reads=("threshold", "evaluation_tokens", "loss_tokens", "pool_size", "pool_controls"),
    tables={"pools": products, "lost_by_pools": lost_features},
    claims=judge,
    asked=_asked,
)
