"""Local structure: do groups of unstable features, of a few dimensions each, come back in a seed that had no part in finding them?

Groups are found on some seeds and one half of the documents, and judged on other seeds and the other half. Two features of a block
of r dimensions have a squared cosine of 1/r on average, and others one of 1/d: so features are clustered by squared cosines
(spectral clustering; Ng, Jordan & Weiss 2001). Beside each clustering stands a random partition into groups of the same sizes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.cluster import SpectralClustering
from tqdm import tqdm

from sae_stability.matching.theory import ambiguity_rank
from sae_stability.subspaces.geometry import captured, rank_holding, strongest_axes
from sae_stability.subspaces.written import Members, Written

SIZE = 16
"""Features of a seed in a group, on average."""
REAPPEARS = 0.5
"""Share of its ceiling that a held-out seed's features must capture of a group: the square of a cosine of 0.7."""
COLUMNS = ["partition", "group", "seed", "features", "rank", "share", "swapped", "ambiguity_rank"]
CLUSTERED, RANDOM = "clustered", "random"


class Ensemble(NamedTuple):
    """Seeds whose groups are asked for, by their positions."""

    written: Sequence[Written]
    errors: Sequence[Float[np.ndarray, "token d_in"]]
    """What each SAE leaves of the tokens of `Written.on_sample`."""
    unstable: Sequence[Members]
    """The unstable features of each seed, by the seeds of its own half."""


def clustered(rows: Float[np.ndarray, "feature d_in"], groups: int) -> Int[np.ndarray, "feature"]:
    """The number of each row's group. Rows have unit length, and their sign plays no part."""
    method = SpectralClustering(groups, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    return method.fit_predict(np.square(rows @ rows.T))


def judge_groups(ensemble: Ensemble, found_on: Sequence[int], judged_on: Sequence[int], described: str) -> pd.DataFrame:
    """Group the unstable features of some seeds, and ask of others whether they come back: a row a partition, group and such seed.

    Columns: `partition` (`clustered`, or `random` groups of the same sizes), `group`, `seed` (its position); `features` of a seed
    in the group; `rank` at 90 % of its energy; `share` (of its ceiling) of the group's energy that as many features of the held-out
    seed capture, those that lie inside the group's subspace most; `swapped`, how much of the explained variance that is lost
    without a seed's features of the group these bring back in their place; `ambiguity_rank`, by best cosines. No rows where a seed
    has fewer than `SIZE` unstable features, or the text has one part.
    """
    if len(ensemble.written[0].parts) < 2 or min(map(len, ensemble.unstable)) < SIZE:
        return pd.DataFrame(columns=COLUMNS)
    rows = np.concatenate([ensemble.written[seed].directions[ensemble.unstable[seed]] for seed in found_on])
    owner = np.concatenate([np.full(len(ensemble.unstable[seed]), seed) for seed in found_on])
    feature = np.concatenate([ensemble.unstable[seed] for seed in found_on])
    count = max(2, round(len(rows) / len(found_on) / SIZE))
    labels = {CLUSTERED: clustered(rows, count)}
    labels[RANDOM] = np.random.default_rng(0).permutation(labels[CLUSTERED])
    found = []
    for group in tqdm(np.unique(labels[CLUSTERED]), described, unit="group", disable=None):
        for partition, label in labels.items():
            members = {seed: feature[(label == group) & (owner == seed)] for seed in found_on}
            for held_out in judged_on:
                row = {"partition": partition, "group": int(group), "seed": held_out}
                found.append(row | _judged(ensemble, members, held_out))
    return pd.DataFrame(found)


def _judged(ensemble: Ensemble, members: Mapping[int, Members], held_out: int) -> dict[str, float]:
    """A group on one held-out seed."""
    other, candidates = ensemble.written[held_out], ensemble.unstable[held_out]
    halves = [np.arange(half, len(other.tokens), 2) for half in (0, 1)]
    moments = [ensemble.written[seed].moments(of_seed) for seed, of_seed in members.items() if len(of_seed)]
    here, there = (np.sum([each.covariance(half) for each in moments], axis=0) for half in halves)
    axes, energies = strongest_axes(here)
    rank = max(1, round(rank_holding(energies)))
    inside = np.square(other.directions[candidates] @ axes[:, :rank]).sum(1)
    size = max(1, round(np.mean([len(of_seed) for of_seed in members.values()])))
    chosen = candidates[np.sort(np.argsort(-inside, kind="stable")[:size])]
    theirs = other.moments(chosen).strongest_axes(halves[0])[0][:, :rank]
    directions = np.concatenate([each.directions for each in moments])
    best = (directions @ other.directions[candidates].T).max(1)
    return {
        "features": size,
        "rank": rank,
        "share": float(captured(there, theirs)[-1] / captured(there, axes[:, :rank])[-1]),
        "swapped": float(np.nanmean([_swapped(ensemble, seed, of_seed, held_out, chosen) for seed, of_seed in members.items()])),
        "ambiguity_rank": ambiguity_rank(float(np.median(best))),
    }


def _swapped(ensemble: Ensemble, seed: int, members: Members, held_out: int, chosen: Int[np.ndarray, "chosen"]) -> float:
    """How much of the explained variance that is lost without a seed's features those of another seed bring back.

    What these would bring if nothing were missing is taken off: anything that fires may explain some of what the SAE leaves.
    """
    intact, brought = ensemble.errors[seed], ensemble.written[held_out].on_sample(chosen)
    without = intact + ensemble.written[seed].on_sample(members)
    lost = np.square(without[1::2]).sum() - np.square(intact[1::2]).sum()
    return float((_brought(without, brought) - _brought(intact, brought)) / lost) if lost > 0 else np.nan


def _brought(error: Float[np.ndarray, "token d_in"], brought: Float[np.ndarray, "token d_in"]) -> float:
    """How much smaller a squared error is with what is brought, by one least-squares gain from every other token, on the rest."""
    gain = np.vdot(error[::2], brought[::2]) / max(np.vdot(brought[::2], brought[::2]), 1e-30)
    return float(np.square(error[1::2]).sum() - np.square(error[1::2] - gain * brought[1::2]).sum())
