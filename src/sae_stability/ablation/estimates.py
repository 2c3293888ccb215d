"""What sets of features carry, with intervals over seeds and text.

With a seed left out, the sets are others: bands are derived again. To remove them again would cost a pass of the model for each. So
the number that was measured of a seed is moved by what its set gains or loses in *additive share*: the share of the impacts of
single features, each alone, which is known for every set at once. A removal is nearly additive, and only the width of an interval
rests on that, never its value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae_stability.ablation.controls import ALL, RETURNS, Name, Sets, sets_of
from sae_stability.ablation.effects import COMPLEMENT, Effects
from sae_stability.ablation.impacts import Impacts, Reappearing
from sae_stability.matching import BANDS, Stability
from sae_stability.statistics import Interval, bootstrap_ratio, jackknife, resampled


@dataclass(frozen=True, eq=False)
class Estimates:
    """Effects of the removal of sets of an ensemble's features, as estimates with 95 % intervals.

    Intervals over seeds are delete-one-seed jackknives with all sets derived again; documents (of single features' impact on the
    prediction, contexts) are resampled beside them.
    """

    effects: Effects
    impacts: Impacts
    stability: Stability

    @property
    def single(self) -> Reappearing:
        """Of single features: what they weigh, and how much of it reappears."""
        return Reappearing(self.impacts, self.stability)

    @cached_property
    def sets(self) -> Sets:
        return self._sets(None)

    def _sets(self, seeds: list[int] | None) -> Sets:
        return sets_of(self.stability, self.impacts.energy, self.impacts.firings, self.effects.curves, seeds)

    @property
    def seeds(self) -> int:
        return len(self.stability.alive)

    @cached_property
    def _without(self) -> list[Sets]:
        """The sets with each seed left out."""
        return [self._sets([seed for seed in range(self.seeds) if seed != left_out]) for left_out in range(self.seeds)]

    def _members(self, name: Name, seeds: list[int]) -> Tensor:
        """A set as a study of all seeds, or of all but one, has it."""
        if len(seeds) == self.seeds:
            return self.sets.members[name]
        (left_out,) = set(range(self.seeds)) - set(seeds)
        return self._without[left_out].members[name]

    def _additive(self, measure: str, name: Name, seeds: list[int]) -> Float[np.ndarray, "kept"]:
        """The share of single features' impacts that a set of some seeds holds."""
        weight = self.single.weight("reconstruction" if measure in ("reconstruction", "reselected") else "prediction")
        member = self._members(name, seeds).numpy()
        of = weight[seeds[: len(member)]]
        return (of * member).sum(1) / of.sum(1)

    def _interval(
        self,
        measure: str,
        parts: dict[Name, float],
        numerator: Float[np.ndarray, "seed document"],
        denominator: Float[np.ndarray, "*seed document"],
        scale: Float[np.ndarray, "seed"] | float = 1.0,
    ) -> Interval:
        """The mean over seeds of sum(numerator) / sum(denominator), both summed over documents.

        `parts` are the sets that the numerator measures, each with its factor; `scale` turns additive shares into its units.
        """
        denominator = np.broadcast_to(denominator, numerator.shape)
        by_seed, scale = numerator.sum(1) / denominator.sum(1), np.broadcast_to(scale, len(numerator))
        everyone = list(range(self.seeds))
        first = sum(factor * self._additive(measure, name, everyone) for name, factor in parts.items())

        def estimate(kept: list[int]) -> float:
            known = [seed for seed in kept if seed < len(by_seed)]  # curves are those of the first seeds
            then = sum(factor * self._additive(measure, name, kept)[: len(known)] for name, factor in parts.items())
            return float((by_seed[known] + scale[known] * (then - first[known])).mean())

        weights = resampled(numerator.shape[1])
        return jackknife(estimate, self.seeds, ((weights @ numerator.T) / (weights @ denominator.T)).mean(1))

    def share(self, measure: str, reading: str, name: Name, less: Name | None = None) -> Interval:
        """What a set carries (less another one), as a share of what is lost without any feature."""
        parts = {name: 1.0} if less is None else {name: 1.0, less: -1.0}
        carried = sum(factor * self.effects.carried(measure, reading, part) for part, factor in parts.items())
        return self._interval(measure, parts, carried, self._everything(measure, reading)[: len(carried)])

    def raw(self, measure: str, reading: str, name: Name) -> Interval:
        """The change itself: of the unexplained variance, or in nats a token."""
        lost, size = self.effects.lost(measure, reading, name), self.effects.sums[f"{measure}/size"]
        everything = self._everything(measure, reading)[: len(lost)].sum(1) / size.sum()
        return self._interval(measure, {name: 1.0}, lost, size, -everything if reading in COMPLEMENT else everything)

    def _everything(self, measure: str, reading: str) -> Float[np.ndarray, "seed document"]:
        return self.effects.lost(measure, COMPLEMENT.get(reading, reading), ALL)

    def site(self, ablation: str) -> Interval:
        """What ablating the whole site (`zero` or `mean`) does to the cross-entropy, in nats a token; documents are resampled."""
        sums = self.effects.sums
        return bootstrap_ratio(sums[f"prediction/{ablation}"] - sums["prediction/intact"], sums["prediction/size"])

    def shapley(self, measure: str, band: str) -> Interval:
        """The Shapley share of a band: what it adds to what the others carry, averaged over the orders in which the three may come.

        Exact, from all coalitions of the bands (Shapley 1953). The shares of the three bands sum to 1, however little additive the
        measure is, where shares *lost* sum to less and shares *kept* to more.
        """
        kept, lost = (
            {each: self.effects.carried(measure, reading, ("band", each)) for each in BANDS} for reading in ("kept", "removed")
        )
        everything, (one, other) = self._everything(measure, "removed"), (each for each in BANDS if each != band)
        between = (everything - lost[one] - kept[other]) + (everything - lost[other] - kept[one])
        numerator = kept[band] / 3 + between / 6 + lost[band] / 3
        return self._interval(measure, {("band", band): 1.0}, numerator, everything)

    def returning(self, measure: str, less_random: bool = False) -> Interval:
        """The Shapley share of what reappears in another seed, of two players: the mean of what is lost without it and of what is
        kept with it only. A pair statistic: no band cuts it, and it does not depend on the number of seeds.

        Each seed's set is what reappears in the next one. With `less_random`, less the same of as many random features.
        """
        parts = {RETURNS: 1.0, ("random", "returns"): -1.0} if less_random else {RETURNS: 1.0}
        numerator = sum(
            factor * (self.effects.carried(measure, "removed", name) + self.effects.carried(measure, "kept", name)) / 2
            for name, factor in parts.items()
        )
        return self._interval(measure, parts, numerator, self._everything(measure, "removed"))

    def impact(self, name: Name, less: Name | None = None) -> Interval:
        """Mean impact on the prediction of the features of a set (less another's); an average live feature outside it has 1."""
        weight = self.single.weight("prediction")

        def mean_impact(member: Callable[[Name], np.ndarray], summed: Callable[[Name], np.ndarray]):
            everything, ours = member(ALL).sum(), member(name).sum()
            outside = (summed(ALL) - summed(name)) / (everything - ours)
            apart = summed(name) / ours - (summed(less) / member(less).sum() if less else 0.0)
            return apart / outside

        def estimate(kept: list[int]) -> float:
            def member(of: Name) -> np.ndarray:
                return self._members(of, kept).numpy()

            return float(mean_impact(member, lambda of: (weight[kept] * member(of)).sum()))

        resampling = resampled(self.impacts.by_context.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = mean_impact(
                lambda of: self.sets.members[of].numpy(), lambda of: resampling @ self.impacts.alone(self.sets.members[of]).sum(0)
            )
            return jackknife(estimate, self.seeds, drawn)

    def support(self, band: str) -> float:
        """The share of a band's energy that is in features with a match outside it; 0 where no seed has such a band."""
        return float(self._energy("paired", band) / max(self._energy("band", band), 1e-30))

    def balance(self, band: str) -> float:
        """By how much the energy of those features exceeds that of their matches, as a share; NaN where there are none."""
        matched = self._energy("matched", band)
        return float(self._energy("paired", band) / matched - 1) if matched > 0 else float("nan")

    def _energy(self, role: str, band: str) -> float:
        return float((self.impacts.energy * self.sets.members[role, band]).sum())
