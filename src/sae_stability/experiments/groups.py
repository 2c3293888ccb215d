"""Do groups of unstable features come back in seeds that had no part in finding them? A reading beside C7, without a rule."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch.nn.functional as F

from sae_stability import subspaces
from sae_stability.experiments import ensembles, matching, texts
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.subspaces import first, written
from sae_stability.files import write_table
from sae_stability.matching import BANDS
from sae_stability.statistics import jackknifed_mean
from sae_stability.study import Cell, Study
from sae_stability.subspaces.groups import (
    CLUSTERED,
    REAPPEARS,
    Ensemble,
    beyond_random,
    find_groups,
    judge_groups,
    planar_group,
    turned_onto,
)
from sae_stability.subspaces.written import sampled_rows

SMALLEST_RANK, LARGEST_RANK = 2, 1 / 8
"""Ranks of groups that count as low: dimensions, and a share of those of the activations."""
RANDOM_PARTITIONS = 8
"""Partitions at random of the ensemble's features: as many random groups of the size of each clustered one."""
SEEDS, SURROGATE_SEEDS = 6, 4
"""Seeds from which there are three to find groups on and three to judge them, and two of the surrogate's."""


def compute(results: Results, folder: Path) -> None:
    """Group the unstable features of every other seed, and judge the groups on the rest; and as many of each null's."""
    sizes: list[int] = []
    for kind in results.cell.kinds:
        ensemble = grouped(results, kind, sizes)
        everyone = range(len(ensemble.written))
        partitions = RANDOM_PARTITIONS if kind == "real" else 1
        groups = find_groups(ensemble, everyone[0::2])
        found = judge_groups(ensemble, groups, everyone[1::2], f"groups, {kind}", partitions)
        write_table(folder / f"{kind}.parquet", found)
        if kind == "real":
            write_table(folder / "members.parquet", groups)
        sizes = sizes or [len(members) for members in ensemble.unstable]
    write_table(folder / "planar.parquet", _planar(results))


def grouped(results: Results, kind: str, sizes: list[int]) -> Ensemble:
    """What groups are made of: the unstable features of a seed by the seeds of its own half, at most so many if `sizes` says so."""
    seeds, held_out = written(results, kind)
    found, ensemble = first(matching.stability(results, kind), len(seeds)), ensembles.ensemble(results, kind)
    clusters = texts.contexts(results, "evaluation", kind)
    rows = sampled_rows(subspaces.parts_of(clusters.cluster[clusters.is_text][: len(held_out)]))
    x = ensemble.normalise(held_out.data[rows])
    errors = [
        (x - sae.b_dec - codes.decode(sae.W_dec)).double().numpy()
        for (sae, codes), _ in zip(ensemble.codes(x), seeds, strict=False)
    ]
    unstable = []
    for position, seed in enumerate(seeds):
        half = list(range(position % 2, len(seeds), 2))
        band = found.among(half).band[half.index(position)]
        members = np.flatnonzero((band == BANDS.index("unstable")) & (seed.firings > 0))
        if sizes:
            members = np.sort(np.random.default_rng(position).permutation(members)[: sizes[position % len(sizes)]])
        unstable.append(members)
    return Ensemble(seeds, errors, unstable)


def _planar(results: Results) -> pd.DataFrame:
    """The group of intermediate features of two dimensions that most of the first seeds meet (`planar_group`)."""
    directions = F.normalize(ensembles.ensemble(results).W_dec[:SEEDS], dim=2).double().numpy()
    band = first(matching.stability(results), len(directions)).band
    members = [np.flatnonzero(of_seed == BANDS.index("intermediate")) for of_seed in band]
    found = planar_group([rows[of_seed] for rows, of_seed in zip(directions, members, strict=True)], members)
    turned = turned_onto(found["x"].to_numpy(float), found["y"].to_numpy(float), found["seed"].to_numpy(int))
    found = found.reset_index(drop=True).join(turned)
    return found.assign(seed=[results.cell.seed_list[position] for position in found["seed"]])


def members(results: Results) -> pd.DataFrame:
    """One row per unstable feature of every other seed (by its position): the group that it is in."""
    return pd.read_parquet(results.folder("groups") / "members.parquet")


def planar_table(results: Results) -> pd.DataFrame:
    """One row per feature of a group of two dimensions: where its direction lies in the group's plane, and where once turned."""
    return pd.read_parquet(results.folder("groups") / "planar.parquet")


def table(results: Results) -> pd.DataFrame:
    """One row per kind, partition and whether groups of every rank count: how many come back, and what they are like.

    `reappears` is the share of groups that capture `REAPPEARS` of their ceiling in a held-out seed; intervals over these seeds.
    `beyond_random` is how many clustered groups of the ensemble capture more than random ones, corrected for their number.
    """
    rows, d_in = [], ensembles.ensemble(results).W_dec.shape[2]
    for kind in results.cell.kinds:
        found = pd.read_parquet(results.folder("groups") / f"{kind}.parquet")
        found = found.assign(reappears=found["share"] >= REAPPEARS)
        small = found["rank"].between(SMALLEST_RANK, d_in * LARGEST_RANK)
        found = pd.concat([found.assign(of="every rank"), found[small].assign(of="low rank")])
        for (partition, of), groups in found.groupby(["partition", "of"]):
            row = {"kind": kind, "partition": partition, "of": of, "groups": groups["group"].nunique()}
            row |= {column: float(groups[column].median()) for column in ("features", "rank", "ambiguity_rank")}
            asked = (kind, partition, of) == ("real", CLUSTERED, "every rank")
            row["beyond_random"] = beyond_random(found) if asked else np.nan
            for column in ("reappears", "share", "swapped"):
                row |= interval_columns(column, jackknifed_mean(groups.groupby("seed")[column].mean()))
            rows.append(row)
    return pd.DataFrame(rows)


def _enough(study: Study, cell: Cell) -> bool:
    return is_main(study, cell) and len(cell.seed_list) >= SEEDS and cell.surrogate_seeds >= SURROGATE_SEEDS


EXPERIMENT = Experiment(
    "groups",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens"),
    tables={"groups": table, "planar_group": planar_table},
    asked=_enough,
)
