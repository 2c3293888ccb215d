"""Local structure: do groups of unstable features, of a few dimensions each, come back in a seed that had no part in finding them?

Groups are found on some seeds and one half of the documents, and judged on other seeds and the other half. Two features of a block
of r dimensions have a squared cosine of 1/r on average, and others one of 1/d: so features are clustered by squared cosines
(spectral clustering; Ng, Jordan & Weiss 2001). Beside each clustering stand random partitions into groups of the same sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from sklearn.cluster import SpectralClustering
from tqdm import tqdm

from sae_stability.matching.theory import ambiguity_rank
from sae_stability.subspaces.geometry import captured, rank_holding, strongest_axes
from sae_stability.subspaces.written import Members, Written

SIZE = 16
"""Features of a seed in a group, on average."""
REAPPEARS = 0.5
"""Share of its ceiling that a held-out seed's features must capture of a group: the square of a cosine of 0.7."""
FEW = 4
"""Features of a seed in a group that is to be drawn."""
FEWEST_TURNED = 3
"""Features of a seed in a plane of which each can be turned as the others say: one other fits anywhere."""
RANDOM_PLANES = 100
"""Draws of random directions in a plane, for what turning brings by chance."""
COLUMNS = ["partition", "group", "like", "seed", "features", "rank", "share", "swapped", "ambiguity_rank"]
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


def find_groups(ensemble: Ensemble, found_on: Sequence[int]) -> pd.DataFrame:
    """The unstable features of some seeds in groups: one row a feature, with its seed (its position) and its group.

    No rows where a seed has fewer than `SIZE` unstable features, or the text has one part.
    """
    if len(ensemble.written[0].parts) < 2 or min(map(len, ensemble.unstable)) < SIZE:
        return pd.DataFrame(columns=["seed", "feature", "group"])
    rows = np.concatenate([ensemble.written[seed].directions[ensemble.unstable[seed]] for seed in found_on])
    seed = np.concatenate([np.full(len(ensemble.unstable[seed]), seed) for seed in found_on])
    feature = np.concatenate([ensemble.unstable[seed] for seed in found_on])
    group = clustered(rows, max(2, round(len(rows) / len(found_on) / SIZE)))
    return pd.DataFrame({"seed": seed, "feature": feature, "group": group})


def judge_groups(
    ensemble: Ensemble, groups: pd.DataFrame, judged_on: Sequence[int], described: str, random_partitions: int = 1
) -> pd.DataFrame:
    """Ask of other seeds whether groups (`find_groups`) come back: a row a partition, group and such seed.

    Columns: `partition` (`clustered`, or `random` groups of the same sizes, from so many partitions); `group`; `like`, the
    clustered group of its size; `seed` (its position); `features` of a seed in the group; `rank` at 90 % of its energy; `share` (of
    its ceiling) of the group's energy that as many features of the held-out seed capture, those that lie inside the group's
    subspace most; `swapped`, how much of the explained variance that is lost without a seed's features of the group these bring
    back in their place; `ambiguity_rank`, by best cosines.
    """
    if groups.empty:
        return pd.DataFrame(columns=COLUMNS)
    owner, feature, label = (groups[column].to_numpy() for column in ("seed", "feature", "group"))
    found_on = np.unique(owner).tolist()
    shuffle = np.random.default_rng(0)
    partitions = [(CLUSTERED, label), *((RANDOM, shuffle.permutation(label)) for _ in range(random_partitions))]
    places = [(partition, of, group) for partition, of in partitions for group in np.unique(label)]
    found = []
    for number, (partition, of, group) in enumerate(tqdm(places, described, unit="group", disable=None)):
        members = {seed: feature[(of == group) & (owner == seed)] for seed in found_on}
        for row in _judged(
            ensemble, {seed: of_seed for seed, of_seed in members.items() if len(of_seed)}, len(found_on), judged_on
        ):
            found.append({"partition": partition, "group": number, "like": number % len(np.unique(label))} | row)
    return pd.DataFrame(found)


def beyond_random(found: pd.DataFrame, level: float = 0.05) -> int:
    """How many clustered groups capture more than random ones of the same sizes, corrected for the number of groups.

    A group's share, on average over the seeds that judge it, is compared with those of the random groups of its size, one a
    partition, whose spread is pooled over groups (Student's t for one more observation); the false discovery rate is held at
    `level` (Benjamini & Hochberg 1995). Columns as of `judge_groups`.
    """
    shares = found.groupby(["partition", "like", "group"])["share"].mean()
    random, clustered = (shares[partition].groupby("like") for partition in (RANDOM, CLUSTERED))
    partitions, freedom = random.size(), int((random.size() - 1).sum())
    spread = np.sqrt((random.var(ddof=1) * (partitions - 1)).sum() / freedom * (1 + 1 / partitions))
    p = stats.t.sf((clustered.mean() - random.mean()) / spread, freedom)
    return int((stats.false_discovery_control(p) <= level).sum())


def _judged(
    ensemble: Ensemble, members: Mapping[int, Members], found_on: int, judged_on: Sequence[int]
) -> Iterator[dict[str, float]]:
    """A group of `found_on` seeds on each held-out seed."""
    halves = [np.arange(half, len(ensemble.written[0].tokens), 2) for half in (0, 1)]
    moments = [ensemble.written[seed].moments(of_seed) for seed, of_seed in members.items()]
    here, there = (np.sum([each.covariance(half) for each in moments], axis=0) for half in halves)
    axes, energies = strongest_axes(here)
    rank = max(1, round(rank_holding(energies)))
    axes = axes[:, :rank]
    own = captured(there, axes)[-1]
    directions = np.concatenate([each.directions for each in moments])
    size = max(1, round(len(directions) / found_on))
    swaps = [_Swap(ensemble.errors[seed], ensemble.written[seed].on_sample(of_seed)) for seed, of_seed in members.items()]
    for held_out in judged_on:
        other, candidates = ensemble.written[held_out], ensemble.unstable[held_out]
        inside = np.square(other.directions[candidates] @ axes).sum(1)
        chosen = candidates[np.sort(np.argsort(-inside, kind="stable")[:size])]
        theirs = other.moments(chosen).strongest_axes(halves[0])[0][:, :rank]
        best = (directions @ other.directions[candidates].T).max(1)
        written = other.on_sample(chosen)
        brought = [np.ascontiguousarray(written[half::2]) for half in (0, 1)]
        yield {
            "seed": held_out,
            "features": size,
            "rank": rank,
            "share": float(captured(there, theirs)[-1] / own),
            "swapped": float(np.nanmean([swap.kept(brought) for swap in swaps])),
            "ambiguity_rank": ambiguity_rank(float(np.median(best))),
        }


def planar_group(directions: Sequence[Float[np.ndarray, "feature d_in"]], features: Sequence[Members]) -> pd.DataFrame:
    """Of groups of a few features of each seed, the one of two dimensions in which most seeds have `FEWEST_TURNED` features,
    and of equals that which most seeds meet: a row a feature.

    Columns: `seed` (its position), `feature`, `x` and `y` (its direction along the group's first two axes), `rank` of the group's
    directions at 90 % of their energy. Of equals, the one with most features, and then that which lies in its plane most. Empty
    where there is no such group.
    """
    rows, owner, feature = np.concatenate(directions), _owners(features), np.concatenate(features)
    label = clustered(rows, round(len(rows) / len(directions) / FEW)) if len(rows) >= 2 * FEW * len(directions) else np.zeros(0)
    best, chosen = (0, 0, 0, 0.0), pd.DataFrame(columns=["seed", "feature", "x", "y", "rank"])
    for group in np.unique(label):
        inside = label == group
        axes, energies = strongest_axes(rows[inside].T @ rows[inside])
        rank = rank_holding(energies)
        sizes = np.unique(owner[inside], return_counts=True)[1]
        order = (int((sizes >= FEWEST_TURNED).sum()), len(sizes), int(inside.sum()), energies[:2].sum() / energies.sum())
        if round(rank) == 2 and order > best:
            x, y = (rows[inside] @ axes[:, :2]).T
            best = order
            chosen = pd.DataFrame({"seed": owner[inside], "feature": feature[inside], "x": x, "y": y, "rank": rank})
    return chosen


def turned_onto(
    x: Float[np.ndarray, "feature"], y: Float[np.ndarray, "feature"], owner: Int[np.ndarray, "feature"]
) -> pd.DataFrame:
    """Turn the features of each seed in a plane onto those of one seed, each by an angle that was learned on the others.

    A row a feature, in their order. Columns: `turned_x` and `turned_y`, its direction after the turn; `before` and `after`, its
    largest cosine in the plane with a feature of that seed; `by_chance`, the mean of `after` where the directions of each seed were
    drawn at random. That seed is the one with most features, of equals the first. Nan for its own features, and for seeds with
    fewer than `FEWEST_TURNED`.
    """
    angles, (seeds, sizes) = np.arctan2(y, x), np.unique(owner, return_counts=True)
    found = pd.DataFrame(np.nan, index=range(len(angles)), columns=["turned_x", "turned_y", "before", "after", "by_chance"])
    if not len(seeds):
        return found
    onto = seeds[sizes.argmax()]
    fixed = angles[owner == onto]
    draw = np.random.default_rng(0)
    for seed in seeds:
        place = np.flatnonzero(owner == seed)
        if seed == onto or len(place) < FEWEST_TURNED:
            continue
        turned = angles[place] + _turns(angles[place], fixed)
        length = np.hypot(x[place], y[place])
        found.loc[place, "turned_x"], found.loc[place, "turned_y"] = length * np.cos(turned), length * np.sin(turned)
        found.loc[place, "before"], found.loc[place, "after"] = _nearest(angles[place], fixed), _nearest(turned, fixed)
        drawn = draw.uniform(0, 2 * np.pi, (RANDOM_PLANES, len(place) + len(fixed)))
        by_chance = [
            _nearest(each[: len(place)] + _turns(each[: len(place)], each[len(place) :]), each[len(place) :]) for each in drawn
        ]
        found.loc[place, "by_chance"] = np.mean(by_chance)
    return found


def _nearest(angles: Float[np.ndarray, "feature"], fixed: Float[np.ndarray, "other"]) -> Float[np.ndarray, "feature"]:
    """The largest cosine of each direction of a plane with one of the others."""
    return np.cos(angles[:, None] - fixed).max(1)


def _turns(angles: Float[np.ndarray, "feature"], fixed: Float[np.ndarray, "other"]) -> Float[np.ndarray, "feature"]:
    """For each direction the turn that brings the *others* nearest to fixed ones, of those that lay one of them on one of these."""
    found = np.zeros(len(angles))
    for left_out in range(len(angles)):
        others = np.delete(angles, left_out)
        turns = (fixed[:, None] - others).ravel()
        cosines = np.cos((others + turns[:, None])[:, :, None] - fixed)
        found[left_out] = turns[cosines.max(2).sum(1).argmax()]
    return found


def _owners(features: Sequence[Members]) -> Int[np.ndarray, "feature"]:
    """The position of the seed of each feature."""
    return np.repeat(np.arange(len(features)), list(map(len, features)))


class _Swap:
    """Takes the features of a group from a seed and lets others write in their place.

    `error` is what the SAE leaves of each token, and `written` what the features write. A least-squares gain comes from every other
    token, and the rest judge it.
    """

    def __init__(self, error: Float[np.ndarray, "token d_in"], written: Float[np.ndarray, "token d_in"]):
        self.intact = [np.ascontiguousarray(error[half::2]) for half in (0, 1)]
        self.without = [intact + written[half::2] for half, intact in enumerate(self.intact)]

    def kept(self, brought: Sequence[Float[np.ndarray, "token d_in"]]) -> float:
        """How much of the explained variance that is lost without the features what others write on either half brings back.

        What it would bring if nothing were missing is taken off: anything that fires may explain some of what the SAE leaves.
        """
        lost = np.vdot(self.without[1], self.without[1]) - np.vdot(self.intact[1], self.intact[1])
        return float((_gained(self.without, brought) - _gained(self.intact, brought)) / lost) if lost > 0 else np.nan


def _gained(error: Sequence[np.ndarray], brought: Sequence[np.ndarray]) -> float:
    """How much smaller a squared error is with what is brought: |e|^2 - |e - g b|^2, from inner products alone."""
    gain = np.vdot(error[0], brought[0]) / max(np.vdot(brought[0], brought[0]), 1e-30)
    return float(2 * gain * np.vdot(error[1], brought[1]) - gain**2 * np.vdot(brought[1], brought[1]))
