"""Sets of two seeds side by side: do they write in the same directions?

For seeds s and t the bands of both come from the other seeds (no double dipping), and s is read on one half of the documents, t on
the other: on the same documents noise overlaps by more than chance. Each seed is left out in turn, and bands are derived again
without it; so is each part of the documents, with bands held.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, permutations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sae_stability import threads
from sae_stability.statistics import Interval, reach_without
from sae_stability.subspaces.geometry import captured, overlaps, principal_angles, rank_holding, strongest_axes
from sae_stability.subspaces.sets import Chosen
from sae_stability.subspaces.written import Moments, Written

RANKS_OVER_D = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
RULE_OVER_D = 1 / 16
"""The rank at which rules are judged, a convention: tables have the others."""
CROSSED = (("paired", "matched"), ("matched", "paired"))
"""Sets of which one is looked for in the other, beside each in itself."""
FEWEST_PARTS = 4
"""Parts of the documents from which each can be left out: two are left on either half, or one."""
WRITTEN = "written"
"""The name of the coordinates in which nothing is changed."""
COMPARED = ("unstable", "paired", "matched")
"""Sets that are compared in all coordinates; others are in those in which nothing is changed."""
AXES = "principal axes"
"""What a set is captured by beside sets: the strongest axes of the activations."""

Key = tuple[str, ...]
"""(quantity, coordinates, set of s, set of t, rank); the last three where a quantity has them."""
Coordinates = Mapping[str, Float[np.ndarray, "d_in d_in"]]
"""Linear maps of what is written, by name."""
Found = tuple[Key, int, int, float]
"""A quantity of an ordered pair of seeds."""


def ranks(d_in: int) -> list[int]:
    """The ranks at which subspaces are compared."""
    return sorted({max(1, round(share * d_in)) for share in RANKS_OVER_D})


def rule_rank(d_in: int) -> int:
    return max(1, round(RULE_OVER_D * d_in))


@dataclass(frozen=True)
class Compared:
    """Quantities of ordered pairs of seeds (s, t), with bands derived again without each other seed."""

    values: dict[Key, Float[np.ndarray, "left_out seed seed"]]
    """[u, s, t]: without seed u; the last of the first axis leaves out none. NaN where a set is too small."""
    without_part: dict[Key, Float[np.ndarray, "part seed seed"]]
    """[p, s, t]: of all seeds, without each part of the documents. Not of what depends on no text."""

    def interval(self, statistic: Callable[..., float], *keys: Key) -> Interval:
        """A statistic of the means over pairs of some quantities, with its interval over seeds and text.

        Not a number where one of them was found of no pair; without ends where a seed less leaves no bands, as of three seeds.
        """
        if any(key not in self.values for key in keys):
            return Interval(np.nan, np.nan, np.nan)
        seeds = [self.values[key] for key in keys]
        text = [self.without_part.get(key, np.repeat(self.values[key][-1:], self._parts, 0)) for key in keys]
        value, *without_seed = (statistic(*means) for means in zip(*map(_over_pairs, (each[::-1] for each in seeds)), strict=True))
        without_text = [statistic(*means) for means in zip(*map(_over_pairs, text), strict=True)]
        reach = reach_without(without_seed)
        return Interval(value, value - reach, value + reach).widened(reach_without(without_text))

    def with_set(self, other: "Compared", of: str, name: str) -> "Compared":
        """The same with a set of another comparison of the same seeds, under a name of its own."""
        named = {key: tuple(name if part == of else part for part in key) for key in other.values if of in key}
        return Compared(
            self.values | {named[key]: other.values[key] for key in named},
            self.without_part | {named[key]: other.without_part[key] for key in named if key in other.without_part},
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a file; `Compared.of` reads it."""
        by_name = {"seeds": self.values, "text": self.without_part}
        return {"/".join((name, *key)): values for name, found in by_name.items() for key, values in found.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Compared":
        found: dict[str, dict[Key, np.ndarray]] = {"seeds": {}, "text": {}}
        for path, values in arrays.items():
            name, *key = path.split("/")
            found[name][tuple(key)] = values
        return cls(found["seeds"], found["text"])

    @property
    def _parts(self) -> int:
        return max((len(values) for values in self.without_part.values()), default=2)


def compare(
    seeds: list[Written],
    chosen: Chosen,
    coordinates: Coordinates,
    covariance: Float[np.ndarray, "d_in d_in"],
    described: str,
) -> Compared:
    """All quantities of all pairs of seeds. `covariance` is that of the activations, whose axes are a subspace to compare with.

    Quantities: `features`, how many a set has, their mean `energy` and `frequency`; `rank`, at 90 % of its energy; `overlap`,
    `angle` (the median principal angle, in degrees), `captured` (the share of the energy of a set of s inside the subspace of a set
    of t) and `ceiling` (inside its own subspace, of the other documents), each at several ranks; `correlation` of what two sets
    write, token by token.

    A pair of seeds gives what is found with all seeds; a triple what is found of each two of it without the third. Each is worked
    on alone, several at a time. Nothing is compared on a text of one part, and one of fewer than four tells no interval.
    """
    count, parts = len(seeds), len(seeds[0].parts)
    if parts < 2:
        return Compared({}, {})
    pairs, triples = (list(combinations(range(count), size)) for size in (2, 3))
    values: dict[Key, np.ndarray] = defaultdict(lambda: np.full((count + 1, count, count), np.nan))
    without_part: dict[Key, np.ndarray] = defaultdict(lambda: np.full((parts, count, count), np.nan))
    principal = {name: strongest_axes(by.T @ covariance @ by)[0] for name, by in coordinates.items()}

    def work(group: tuple[int, ...]) -> list[tuple[int | None, list[Found]]]:
        """What is found of a pair or a triple with the whole text (None), and of a pair also without each part of it."""
        among = _Group(seeds, chosen, coordinates, principal, group)
        left_out = [None, *range(parts)] if len(group) == 2 and parts >= FEWEST_PARTS else [None]
        return [(part, list(among.quantities(part))) for part in left_out]

    groups = pairs + triples
    for group, readings in zip(groups, threads.each_group(work, groups, described), strict=True):
        for part, found in readings:
            for key, s, t, value in found:
                (without,) = {*group} - {s, t} or {count}
                place = values[key][without] if part is None else without_part[key][part]
                place[s, t] = value
    if parts < FEWEST_PARTS:
        return Compared(dict(values), {key: np.full((2, count, count), np.nan) for key in values if key[0] != "features"})
    return Compared(dict(values), dict(without_part))


class _Span:
    """The subspaces of a set in some coordinates, on either half of the documents."""

    def __init__(self, moments: Moments):
        self.moments, self.size = moments, len(moments.directions)
        self.found: dict[tuple[int, ...], _Half] = {}

    def on(self, half: int, part: int | None) -> "_Half":
        """On every other part of the documents from `half` on, without one of them."""
        parts = tuple(number for number in range(half, len(self.moments.tokens), 2) if number != part)
        if parts not in self.found:
            covariance, axes, energies = self.moments.spectrum(np.array(parts))
            self.found[parts] = _Half(covariance, axes[:, : max(ranks(len(axes)))], energies)
        return self.found[parts]


class _Half(NamedTuple):
    covariance: Float[np.ndarray, "d_in d_in"]
    axes: Float[np.ndarray, "d_in axis"]
    """The strongest ones, as many as are compared."""
    energies: Float[np.ndarray, "axis"]


class _Group:
    """Seeds whose sets are chosen by all other seeds alone."""

    def __init__(
        self, seeds: list[Written], chosen: Chosen, coordinates: Coordinates, principal: Coordinates, group: tuple[int, ...]
    ):
        self.seeds, self.principal, self.group = seeds, principal, group
        self.sets = {seed: chosen(seed, frozenset(group) - {seed}) for seed in group}
        self.products = self._products()
        moments = {
            seed: {of: seeds[seed].moments(members) for of, members in sets.items() if len(members)}
            for seed, sets in self.sets.items()
        }
        self.spans = {
            name: {
                seed: {of: _Span(each.mapped(by)) for of, each in sets.items() if name == WRITTEN or of in COMPARED}
                for seed, sets in moments.items()
            }
            for name, by in coordinates.items()
        }

    def quantities(self, part: int | None) -> Iterator[Found]:
        """All that is asked of each ordered pair of the seeds, without a part of the documents."""
        if part is None:
            yield from self._sizes()
        yield from self._correlations(part)
        for name in self.spans:
            for s, t in permutations(self.group, 2):
                for (quantity, *of), value in _of_pair(self.spans[name][s], self.spans[name][t], self.principal[name], part):
                    yield (quantity, name, *of), s, t, value

    def _sizes(self) -> Iterator[Found]:
        for s, t in permutations(self.group, 2):
            for of, members in self.sets[s].items():
                yield ("features", of), s, t, len(members)
                if len(members):
                    yield ("energy", of), s, t, float(self.seeds[s].energy[members].mean())
                    yield ("frequency", of), s, t, float(self.seeds[s].firings[members].mean() / self.seeds[s].tokens.sum())

    def _products(self) -> dict[tuple[str, int, int], Float[np.ndarray, "part"]]:
        """Inner products of what a set of two seeds writes, or of one, over the sampled tokens of each part of the documents."""
        found = {}
        for of in self.sets[self.group[0]]:
            written = {seed: self.seeds[seed].on_sample(self.sets[seed][of]) for seed in self.group if self.seeds[seed].together}
            for s, t in combinations_with_replacement(written, 2):
                by_token = np.einsum("td,td->t", written[s], written[t])
                found[of, s, t] = found[of, t, s] = np.bincount(self.seeds[s].sampled_part, by_token)
        return found

    def _correlations(self, part: int | None) -> Iterator[Found]:
        kept = np.arange(len(self.seeds[self.group[0]].parts)) != part
        for of, s, t in self.products:
            if s != t:
                across, one, other = (self.products[of, *pair][kept].sum() for pair in ((s, t), (s, s), (t, t)))
                yield ("correlation", of), s, t, across / (one * other) ** 0.5 if one * other > 0 else np.nan


def _of_pair(
    one: dict[str, _Span], other: dict[str, _Span], principal: Float[np.ndarray, "d_in d_in"], part: int | None
) -> Iterator[tuple[Key, float]]:
    """Seed s on the first half of the documents, seed t on the second."""
    wanted, at = ranks(len(principal)), rule_rank(len(principal))
    for of, span in one.items():
        here = span.on(0, part)
        yield ("rank", of), rank_holding(here.energies)
        own, by_axes = captured(here.covariance, span.on(1, part).axes), captured(here.covariance, principal[:, : max(wanted)])
        for r in (r for r in wanted if r <= span.size):
            yield ("ceiling", of, of, str(r)), own[r - 1]
            yield ("captured", of, AXES, str(r)), by_axes[r - 1]
    for of, by in [*((of, of) for of in one), *CROSSED]:
        if of not in one or by not in other:
            continue
        here, there = one[of].on(0, part), other[by].on(1, part)
        inside, alike = captured(here.covariance, there.axes), overlaps(here.axes, there.axes) if of == by else None
        for r in (r for r in wanted if r <= min(one[of].size, other[by].size)):
            yield ("captured", of, by, str(r)), inside[r - 1]
            if alike is not None:
                yield ("overlap", of, by, str(r)), alike[r - 1]
                if r == at:
                    yield ("angle", of, by, str(r)), float(np.median(principal_angles(here.axes[:, :r], there.axes[:, :r])))


def _over_pairs(values: Float[np.ndarray, "any seed seed"]) -> Float[np.ndarray, "any"]:
    """The mean over pairs of seeds; NaN where there is none."""
    known = np.isfinite(values)
    counts = known.sum((1, 2))
    return np.where(counts > 0, np.where(known, values, 0).sum((1, 2)) / np.maximum(counts, 1), np.nan)
