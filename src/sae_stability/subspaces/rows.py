"""Decoder rows alone, as the paper asks: how many dimensions they take, how much of another seed's rows lies in the strongest of
them, and whether a logistic regression on the rows of one seed tells the bands of another (PAPER, What readers report)."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from sae_stability import threads
from sae_stability.matching import Stability
from sae_stability.subspaces.geometry import captured, effective_rank, strongest_axes
from sae_stability.subspaces.pairs import Compared, Found, Key, ranks
from sae_stability.subspaces.sets import band_among

SETS = ("stable", "unstable", "random")
FEWEST = 10  # rows of either band from which a regression is fitted, or judged


def compare_rows(directions: Float[np.ndarray, "seed d_sae d_in"], stability: Stability, described: str) -> Compared:
    """Quantities of all pairs of seeds, with bands by the seeds that are not of the pair, and again without each other seed.

    Of as many `stable`, `unstable` and `random` live features: `effective rank over d`; `captured`, the share of the squared length
    of a set's rows inside the top r singular subspace of the same set of the other seed, and `ceiling`, inside its own. And of a
    logistic regression that tells unstable from stable rows, fitted on seed s: `F1` (of the unstable) and `ROC` (area) on seed t,
    and on the rows of t turned by a random rotation (`rotated`); `share of unstable rows` among those that are judged.
    """
    count = len(directions)
    groups = [*combinations(range(count), 2), *combinations(range(count), 3)]
    values: dict[Key, np.ndarray] = defaultdict(lambda: np.full((count + 1, count, count), np.nan))
    found = threads.each_group(lambda group: list(_of_group(directions, stability, group)), groups, described)
    for group, quantities in zip(groups, found, strict=True):
        for key, s, t, value in quantities:
            (without,) = {*group} - {s, t} or {count}
            values[key][without, s, t] = value
    return Compared(dict(values), {})


def _of_group(directions: Float[np.ndarray, "seed d_sae d_in"], stability: Stability, group: tuple[int, ...]) -> Iterator[Found]:
    d_in = directions.shape[2]
    band = {seed: band_among(stability, seed, frozenset(group) - {seed}) for seed in group}
    rows = {seed: _as_many(directions[seed], band[seed], seed) for seed in group}
    squares = {seed: {of: each.T @ each for of, each in sets.items()} for seed, sets in rows.items()}
    axes = {seed: {of: strongest_axes(each)[0] for of, each in sets.items()} for seed, sets in squares.items()}
    own = {seed: {of: captured(each, axes[seed][of]) for of, each in sets.items()} for seed, sets in squares.items()}
    dimensions = {seed: {of: effective_rank(torch.from_numpy(each)) for of, each in sets.items()} for seed, sets in rows.items()}
    regressions = {seed: _fitted(directions[seed], band[seed]) for seed in group}
    for s, t in permutations(group, 2):
        for of, each in rows[s].items():
            if not len(each):
                continue
            yield ("effective rank over d", of), s, t, dimensions[s][of] / d_in
            inside = captured(squares[s][of], axes[t][of])
            for r in (r for r in ranks(d_in) if r <= min(len(each), len(rows[t][of]))):
                yield ("captured", of, of, str(r)), s, t, inside[r - 1]
                yield ("ceiling", of, of, str(r)), s, t, own[s][of][r - 1]
        judged, regression = np.isin(band[t], (0, 2)), regressions[s]
        unstable, there = band[t][judged] == 2, directions[t][judged]
        if regression is None or min(unstable.sum(), (~unstable).sum()) < FEWEST:
            continue
        yield ("share of unstable rows", "judged"), s, t, float(unstable.mean())
        for name, x in {"told": there, "rotated": there @ _rotation(d_in, s, t)}.items():
            yield ("F1", name), s, t, float(f1_score(unstable, regression.predict(x)))
            yield ("ROC", name), s, t, float(roc_auc_score(unstable, regression.decision_function(x)))


def _as_many(directions: Float[np.ndarray, "d_sae d_in"], band: np.ndarray, seed: int) -> dict[str, Float[np.ndarray, "row d_in"]]:
    """As many rows of each set, drawn at random, since a rank grows with their number."""
    order = np.random.default_rng(seed).permutation(len(band))
    members = {"stable": order[band[order] == 0], "unstable": order[band[order] == 2], "random": order[band[order] >= 0]}
    size = min(map(len, members.values()))
    return {of: directions[members[of][:size]] for of in SETS}


def _fitted(directions: Float[np.ndarray, "d_sae d_in"], band: np.ndarray) -> LogisticRegression | None:
    """Both bands weigh the same; None where one is hardly there."""
    known = np.isin(band, (0, 2))
    unstable = band[known] == 2
    if min(unstable.sum(), (~unstable).sum()) < FEWEST:
        return None
    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(directions[known], unstable)


def _rotation(d_in: int, s: int, t: int) -> Float[np.ndarray, "d_in d_in"]:
    """Uniform, by the QR decomposition of a Gaussian matrix."""
    q, r = np.linalg.qr(np.random.default_rng([s, t]).standard_normal((d_in, d_in)))
    return q * np.sign(np.diag(r))
