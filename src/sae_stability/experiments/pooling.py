"""Is one SAE out of several seeds more stable, and as good (C9)? Pools of disjoint groups, and what else the same work buys."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.numpy import load_file
from tqdm import tqdm

from sae_stability import evaluation
from sae_stability.experiments import ensembles, quality, texts
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.pools import (
    CALIBRATION,
    LONGER,
    MEANS,
    RANDOM,
    SEEDS,
    SINGLE,
    TUNED,
    TUNED_MEDOIDS,
    TUNED_SINGLE,
    TUNING,
    WIDER,
    Seeds,
    compared,
    features_of,
    shares,
    split,
)
from sae_stability.files import save_arrays, write_table
from sae_stability.ledger import NOWHERE, OTHERWISE, Condition, Rule, judged
from sae_stability.pooling import measure
from sae_stability.statistics import Interval, bootstrap_ratio, difference, jackknifed_mean, matched_pairs, over_pairs
from sae_stability.study import Cell, Study

NOISE_SEEDS = 4
"""Of the surrogate, from which there are two groups of two."""
PARTITIONS = 20
"""Ways to split the seeds, over which stability is averaged."""
JUDGED = 200_000
"""Held-out tokens on which all are judged."""
CALIPER = 0.05
LOSS = -0.01
"""Explained variance, or loss recovered, less that of single SAEs, above which a pool preserves it."""

NOISE, NOISE_SINGLE = "surrogate, means", "surrogate, single"
EXPLAINED, RECOVERED = "explained variance", "loss recovered"
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
    seeds = Seeds.of(ensemble, texts.activations(results, "train"), results.cell.threshold)
    pairs = []
    for partition in tqdm(range(1, PARTITIONS), "pools", unit="partition", disable=None):  # pools of the first are judged
        pairs += [each.assign(partition=partition) for each in seeds.pools(partition)]
    noise = ensembles.ensemble(results, "surrogate")
    of_noise = Seeds.of(noise, texts.activations(results, "train", "surrogate"), results.cell.threshold)
    pairs.append(shares(of_noise.directions, of_noise.energy, seeds.threshold).assign(product=NOISE_SINGLE, partition=0))
    for partition in range(PARTITIONS if len(of_noise.saes) >= NOISE_SEEDS else 0):
        pools = pd.concat(of_noise.pools(partition))
        pairs.append(pools[pools["product"] == MEANS].assign(product=NOISE, partition=partition))

    products = {SINGLE: ensemble} | compared(seeds, results.cell.recipe, results.study.pool_controls, results.study.device)
    held_out, contexts = texts.activations(results, "evaluation").first(JUDGED), texts.contexts(results, "evaluation")
    x, arrays, features = held_out.data[:CALIBRATION].float(), dict[str, np.ndarray](), []
    for name, product in products.items():
        fit = evaluation.fit(product, held_out, contexts.cluster[contexts.is_text])
        arrays |= {f"{name}/firings": fit.firings.numpy(), f"{name}/residual": fit.residual}
        measured = [measure(product.dictionary(one), x) for one in range(len(product.seeds))]
        energy = torch.stack([of_sae.energy for of_sae in measured])
        pairs.append(shares(product.W_dec, energy, seeds.threshold).assign(product=name, partition=0))
        if name in (SINGLE, TUNED):
            frequency = torch.stack([of_sae.firings for of_sae in measured]) / len(x)
            features.append(features_of(product.W_dec, energy, frequency, seeds.threshold).assign(product=name))
    singles = quality.losses(results)
    pool = evaluation.losses(texts.reading(results, results.study.loss_tokens), products[TUNED])
    arrays |= {"total": fit.total, "rows": np.array(fit.rows), "clean": singles.clean, "zero": singles.zero}
    arrays |= {f"{SINGLE}/spliced": singles.spliced, f"{TUNED}/spliced": pool.spliced}
    save_arrays(folder / "judged.safetensors", arrays)
    write_table(folder / "pairs.parquet", pd.concat(pairs, ignore_index=True))
    write_table(folder / "features.parquet", pd.concat(features, ignore_index=True))


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
