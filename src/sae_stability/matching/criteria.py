"""Other ways to say that a feature reappears, beside the default of the best decoder cosine. Each gives a `Stability`.

None is swapped in silently. A cosine of 0.7 does not mean the same under each, so each has its own calibrated threshold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from sae_stability import threads
from sae_stability.language.activations import whitening
from sae_stability.matching.assignment import assign
from sae_stability.matching.pairs import FEWEST, ROUNDING, Activity, correlations, cosines, firings, weaker
from sae_stability.matching.reappearance import Stability, reappear, stability
from sae_stability.statistics import Interval, over_pairs, reach_without

CRITERIA = {
    "decoder": "best cosine of decoder directions (the default)",
    "mutual": "the same, and each feature is the other's best",
    "one-to-one": "decoder cosine with the partner in the best one-to-one pairing",
    "encoder": "best cosine of encoder directions",
    "decoder and encoder": "one partner whose decoder and encoder cosines both reach the threshold",
    "activations": "best correlation of activations on the same tokens, of features that fire on 50 or more",
    "whitened": "best cosine of decoder directions once the activations' covariance is made the identity",
    "without top component": "best cosine of decoder directions once the activations' first principal component is removed",
}
SAME_RATE = 1e-9  # match rates are shares of counts; two that are equal can be told apart by how they were added up only
SMALLEST_VARIANCE = 1e-4  # of the mean one: smaller ones are raised to it before whitening, which would blow up their noise


def by_every_criterion(
    W_dec: Float[Tensor, "seed d_sae d_in"],
    W_enc: Float[Tensor, "seed d_in d_sae"],
    codes: Sequence[sparse.csr_array],
    covariance: Float[Tensor, "d_in d_in"],
    threshold: float,
    alive: Bool[Tensor, "seed d_sae"],
) -> dict[str, Stability]:
    """The stability by each of `CRITERIA`. `codes` and `covariance` are those of the same tokens."""
    default = stability(W_dec, threshold, alive)
    found = {
        "decoder": default,
        "mutual": default.both_ways(),
        "one-to-one": one_to_one(W_dec, threshold, alive),
        "encoder": stability(W_enc.mT, threshold, alive),
        "decoder and encoder": with_encoder(W_dec, W_enc, threshold, alive),
        "activations": by_activation(codes, threshold, alive),
        "whitened": stability(W_dec @ whitening(covariance, SMALLEST_VARIANCE), threshold, alive),
        "without top component": stability(W_dec @ without_top_component(covariance), threshold, alive),
    }
    return {name: found[name] for name in CRITERIA}


def one_to_one(W_dec: Float[Tensor, "seed d_sae d_in"], threshold: float, alive: Bool[Tensor, "seed d_sae"]) -> Stability:
    """A feature reappears if its partner in the best one-to-one pairing reaches the threshold (Song et al., arXiv:2505.20254)."""
    seeds, d_sae, _ = W_dec.shape
    cosine = torch.full((seeds, seeds, d_sae), torch.nan)
    partner = torch.full((seeds, seeds, d_sae), -1)

    def pair(s: int, t: int) -> None:
        of_s, of_t = alive[s].nonzero().squeeze(1), alive[t].nonzero().squeeze(1)
        paired = assign(W_dec[s, of_s], W_dec[t, of_t])
        places = torch.from_numpy(paired.partner)
        there = places >= 0
        rows, columns = of_s[there], of_t[places[there]]
        found = torch.from_numpy(paired.cosine)[there]
        cosine[s, t, of_s], cosine[t, s, of_t] = -1.0, -1.0
        cosine[s, t, rows], cosine[t, s, columns] = found, found
        partner[s, t, rows], partner[t, s, columns] = columns, rows

    threads.each_pair(pair, seeds, "matching one to one")
    return Stability(cosine, partner, torch.full_like(cosine, -1.0), alive, threshold)


def with_encoder(
    W_dec: Float[Tensor, "seed d_sae d_in"],
    W_enc: Float[Tensor, "seed d_in d_sae"],
    threshold: float,
    alive: Bool[Tensor, "seed d_sae"],
) -> Stability:
    """A feature reappears if one feature of the other seed is like it in both its decoder and its encoder direction."""
    D, E = F.normalize(W_dec, dim=2), F.normalize(W_enc.mT, dim=2)
    return reappear(lambda s, t: weaker(cosines(D[s], D[t]), cosines(E[s], E[t])), alive, threshold)


def by_activation(codes: Sequence[sparse.csr_array], threshold: float, alive: Bool[Tensor, "seed d_sae"]) -> Stability:
    """A feature reappears if the activations of one feature of the other seed correlate with its own.

    What fires too rarely to tell (`pairs.FEWEST`) takes no part, as if it were dead. `codes` holds the activations [token, d_sae]
    of each seed on the same tokens.
    """
    activities = [Activity.of(each) for each in codes]
    often = torch.from_numpy(np.stack([firings(each) >= FEWEST for each in codes]))
    return reappear(lambda s, t: correlations(activities[s], activities[t]), alive & often, threshold)


def without_top_component(covariance: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The projection that removes the first principal component of the activations."""
    with threads.single():
        first = torch.linalg.eigh(covariance.double()).eigenvectors[:, -1:]
        return (torch.eye(len(covariance), dtype=torch.float64) - first @ first.T).float()


def mean_mcc(paired: Stability) -> Interval:
    """The mean cosine of one-to-one partners (Song et al., arXiv:2505.20254), over all pairs of seeds, jackknifed over seeds.

    `paired` is what `one_to_one` gave. Pairs of unequal numbers of live features leave some without a partner, which do not count.
    """
    cosines = torch.where(paired.partner >= 0, paired.best_cosine, torch.nan)
    return over_pairs(cosines.nanmean(2).numpy())


@dataclass(frozen=True)
class Calibration:
    """Where chance is rare: the smallest threshold at which the surrogate's match rate is at most a share of the real one."""

    real: "_Rates"
    surrogate: "_Rates"
    share: float

    @cached_property
    def threshold(self) -> float:
        """NaN where there is none.

        A match rate is `Stability.mean`. It changes at best cosines only, so the smallest of all observed ones at which the
        condition holds is given. It need not hold from there on: a few directions of large variance come back in every surrogate,
        with cosines that few real features reach, so at thresholds near 1 chance may weigh more again.
        """
        return self._without(None, None)

    def interval(self, statistic: Callable[[float, list[int], list[int]], float]) -> Interval:
        """A statistic of the threshold and of the seeds of either (positions): both jackknifed, with the threshold found again
        without each seed. No interval where there are fewer than three seeds of either."""
        ours, theirs = list(range(self.real.seeds)), list(range(self.surrogate.seeds))
        value = statistic(self.threshold, ours, theirs)
        real, surrogate = self._thresholds
        without = [statistic(at, [seed for seed in ours if seed != out], theirs) for out, at in enumerate(real)]
        beside = [statistic(at, ours, [seed for seed in theirs if seed != out]) for out, at in enumerate(surrogate)]
        reach = float(np.hypot(reach_without(without), reach_without(beside)))
        return Interval(value, value - reach, value + reach)

    @cached_property
    def _thresholds(self) -> tuple[list[float], list[float]]:
        """What the threshold would be without each seed of either."""
        return (
            [self._without(seed, None) for seed in range(self.real.seeds)],
            [self._without(None, seed) for seed in range(self.surrogate.seeds)],
        )

    def _without(self, real: int | None, surrogate: int | None) -> float:
        ours, theirs = self.real.from_here_on(real), self.surrogate.from_here_on(surrogate)
        allowed = theirs[self._places[1]] - self.share * ours[self._places[0]] <= SAME_RATE
        return float(self._observed[allowed.argmax()]) if allowed.any() else float("nan")

    @cached_property
    def _observed(self) -> Float[np.ndarray, "threshold"]:
        observed = np.unique(np.concatenate([self.real.cosines, self.surrogate.cosines]))
        return observed[observed > 0]

    @cached_property
    def _places(self) -> tuple[Int[np.ndarray, "threshold"], Int[np.ndarray, "threshold"]]:
        """Of each observed threshold, the first cosine of either that reaches it, by the rule of `pairs.reaches`."""
        lowest = (self._observed.astype(np.float64) - ROUNDING).astype(np.float32)
        return self.real.cosines.searchsorted(lowest), self.surrogate.cosines.searchsorted(lowest)


def calibrate(real: Stability, surrogate: Stability, share: float) -> Calibration:
    """The threshold at which a surrogate's features come back at most `share` as often as the real ones."""
    return Calibration(_Rates.of(real), _Rates.of(surrogate), share)


def mean_at(matched: Stability, threshold: float, seeds: list[int]) -> float:
    """The mean stability at a threshold, of some seeds (positions); NaN where there is no threshold, and of a seed alone."""
    if np.isnan(threshold) or len(seeds) < 2:
        return float("nan")
    return float(np.nanmean(matched.at(threshold).match_rates()[np.ix_(seeds, seeds)]))


@dataclass(frozen=True)
class _Rates:
    """The best cosines of live features by size, from which match rates at many thresholds are read at once."""

    seeds: int
    cosines: Float[np.ndarray, "match"]
    weights: Float[np.ndarray, "match"]
    """Of sum 1; every pair of seeds counts as much as any other."""
    pairs: Int[np.ndarray, "2 match"]
    """Of which two seeds."""

    @classmethod
    def of(cls, matched: Stability) -> "_Rates":
        seeds = len(matched.alive)
        there = matched.alive[:, None] & ~torch.eye(seeds, dtype=torch.bool)[:, :, None]
        cosines = matched.best_cosine[there].numpy()
        order = cosines.argsort()
        weights = (there.double() / there.sum(2, keepdim=True))[there].numpy()
        own, other = (torch.arange(seeds, dtype=torch.int16).view(shape).expand(there.shape) for shape in ((-1, 1, 1), (1, -1, 1)))
        pairs = np.stack([each[there].numpy()[order] for each in (own, other)])
        return cls(seeds, cosines[order], (weights / weights.sum())[order], pairs)

    def from_here_on(self, without: int | None) -> Float[np.ndarray, "match_plus_1"]:
        """The weight of each cosine and all larger ones, without the pairs of a seed; NaN where nothing is left."""
        weights = self.weights if without is None else np.where((self.pairs == without).any(0), 0.0, self.weights)
        total = weights.sum()
        return np.append(weights[::-1].cumsum()[::-1], 0.0) / (total if total > 0 else np.nan)
