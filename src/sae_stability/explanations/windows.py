"""Contexts of a feature: those that an engine is shown, and others on which its explanation is scored."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_stability.language.corpus import Contexts
from sae_stability.portraits import firings

Decode = Callable[[Int[np.ndarray, "token"]], list[str]]
REACH = 10  # tokens on either side of the one in the middle
SHOWN = 20  # windows that an engine sees
SCORED = 10  # windows in which the feature fires, and as many in which it does not, that an explanation is scored on


@dataclass(frozen=True)
class Window:
    """A few tokens of text, and how strongly the feature fires on each."""

    tokens: list[str]
    activations: list[float]

    @property
    def fires(self) -> bool:
        return any(activation > 0 for activation in self.activations)


@dataclass(frozen=True)
class Task:
    """What an engine is given for a feature, and what its explanation is scored on. The band is not part of it."""

    feature: int
    shown: list[Window]
    """Around the strongest firings, one a cluster, strongest first."""
    scored: list[Window]
    """From other clusters, in random order: half of them fire, at all strengths."""


def tasks(activations: sparse.csc_array, features: Int[np.ndarray, "chosen"], contexts: Contexts, decode: Decode) -> list[Task]:
    """The windows of some features, drawn alike on every call. `decode` gives the text of each of some tokens in a row.

    `activations` [token, feature] are those of the first text tokens of `contexts`. Every other cluster is for showing, the
    rest for scoring; a feature that fires in too few of them has fewer windows.
    """
    context, position = (along[: activations.shape[0]] for along in np.nonzero(contexts.is_text))
    cluster = np.unique(contexts.cluster[context, position], return_inverse=True)[1]
    row_of = np.full(contexts.tokens.shape, -1)
    row_of[context, position] = np.arange(len(context))
    found = []
    for feature in features:
        rng = np.random.default_rng(int(feature))
        fired, strength = firings(activations, feature)
        along = np.zeros(activations.shape[0], dtype=np.float32)
        along[fired] = strength
        shown, scored = (_peaks(fired, strength, cluster, half) for half in (0, 1))
        spread = np.unique(np.linspace(0, len(scored) - 1, min(SCORED, len(scored))).round().astype(int))
        silent = _silent(rng, along, row_of, context, position, cluster, len(spread))

        def window(row: int, along=along) -> Window:
            return _window(row, along, row_of, context, position, cluster, contexts, decode)

        judged = [window(row) for row in [*scored[spread], *silent]]
        order = rng.permutation(len(judged))
        found.append(Task(int(feature), [window(row) for row in shown[:SHOWN]], [judged[place] for place in order]))
    return found


def _peaks(
    fired: Int[np.ndarray, "firing"], strength: Float[np.ndarray, "firing"], cluster: Int[np.ndarray, "token"], half: int
) -> Int[np.ndarray, "cluster"]:
    """The strongest firing of each cluster of one half, strongest first."""
    order = np.lexsort((fired, -strength))
    order = order[cluster[fired[order]] % 2 == half]
    _, first = np.unique(cluster[fired[order]], return_index=True)
    return fired[order[np.sort(first)]]


def _silent(rng, along, row_of, context, position, cluster, count: int) -> list[int]:
    """Places of the scored half around which the feature does not fire."""
    candidates = rng.permutation(np.flatnonzero(cluster % 2 == 1))
    chosen: list[int] = []
    for row in candidates:
        if len(chosen) == count:
            break
        around = _around(row, row_of, context, position, cluster)
        if not along[around].any():
            chosen.append(int(row))
    return chosen


def _around(row: int, row_of, context, position, cluster) -> Int[np.ndarray, "token"]:
    """The rows of the text tokens around a place, in its context and its document: the next one may be of the other half."""
    start = max(0, position[row] - REACH)
    rows = row_of[context[row], start : position[row] + REACH + 1]
    rows = rows[rows >= 0]
    return rows[cluster[rows] == cluster[row]]


def _window(row: int, along, row_of, context, position, cluster, contexts: Contexts, decode: Decode) -> Window:
    rows = _around(row, row_of, context, position, cluster)
    tokens = contexts.tokens[context[rows], position[rows]]
    return Window(decode(tokens), along[rows].tolist())
