"""The stability of a feature: the share of the other seeds in which it reappears.

Feature i of seed s reappears in seed t if the best cosine of its decoder direction with a live feature of t reaches the
threshold:

    p(s, i) = 1 / (S - 1) * sum over t != s of [ max_j cos(W_dec[s, i], W_dec[t, j]) >= threshold ].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.matching.pairs import ROUNDING, Similarities, compare, cosines, reaches
from sae_stability.statistics import Interval, LatentShares, binomial_interval, fit_beta_binomial, jackknife, over_pairs

STABLE, UNSTABLE = 0.9, 0.1
"""Bands: stable from STABLE up, unstable up to UNSTABLE, the rest intermediate."""
BANDS = ("stable", "intermediate", "unstable")


@dataclass(frozen=True)
class Stability:
    """How often each feature of each seed comes back in the other seeds."""

    best_cosine: Float[Tensor, "seed seed d_sae"]
    """[s, t, i]: the best cosine of feature i of seed s with a live feature of seed t; NaN where t is s, and for dead features."""
    partner: Int[Tensor, "seed seed d_sae"]
    """Which feature of t that is; -1 where there is none."""
    runner_up: Float[Tensor, "seed seed d_sae"]
    """The second best cosine."""
    alive: Bool[Tensor, "seed d_sae"]
    """Dead features take no part: they match nothing and have no stability."""
    threshold: float
    """Cosine from which two features are the same."""

    @cached_property
    def matched(self) -> Bool[Tensor, "seed seed d_sae"]:
        """[s, t, i]: whether feature i of seed s reappears in seed t."""
        return reaches(self.best_cosine, self.threshold)

    @property
    def mutual(self) -> Bool[Tensor, "seed seed d_sae"]:
        """[s, t, i]: whether feature i of seed s is in turn the best of its partner in seed t."""
        partner = self.partner.clamp(min=0)
        back = self.partner.transpose(0, 1).gather(2, partner)
        return (back == torch.arange(partner.shape[2])) & (self.partner >= 0)

    @property
    def ambiguous(self) -> Bool[Tensor, "seed seed d_sae"]:
        """[s, t, i]: a match whose runner-up reaches the threshold too, or which does not hold in both directions."""
        return self.matched & (reaches(self.runner_up, self.threshold) | ~self.mutual)

    @property
    def trials(self) -> int:
        """S - 1: how many other seeds each feature could come back in."""
        return len(self.alive) - 1

    @property
    def counts(self) -> Int[Tensor, "seed d_sae"]:
        """In how many of the other seeds each feature reappears."""
        return self.matched.sum(1)

    @property
    def probability(self) -> Float[Tensor, "seed d_sae"]:
        """The stability p(s, i); NaN for dead features."""
        return torch.where(self.alive, self.counts / self.trials, torch.nan)

    @property
    def interval(self) -> tuple[Float[np.ndarray, "seed d_sae"], Float[np.ndarray, "seed d_sae"]]:
        """Low and high ends of the exact 95 % binomial interval of each probability."""
        return binomial_interval(self.counts.numpy(), self.trials)

    @property
    def band(self) -> Int[np.ndarray, "seed d_sae"]:
        """Index into BANDS; -1 for dead features."""
        return band_of(self.probability.numpy())

    @property
    def held_out_band(self) -> Int[np.ndarray, "seed seed d_sae"]:
        """[s, t, i]: the band of feature i of seed s by the other seeds but t, so that what t shows of it is no part of its band.

        With as many misses, or matches, as the whole study allows (`band_among`). -1 where t is s, for dead features, and
        everywhere in a study of two seeds.
        """
        return self.held_out_band_among(list(range(len(self.alive))))

    def held_out_band_among(self, seeds: list[int]) -> Int[np.ndarray, "kept kept d_sae"]:
        """The same in a study of only these seeds (positions)."""
        matched, themselves = self.matched[seeds][:, seeds], torch.eye(len(seeds), dtype=torch.bool)[:, :, None]
        counts = matched.sum(1, keepdim=True) - matched.int()
        counted = self.alive[seeds][:, None] & ~themselves & (len(seeds) > 2)
        return np.where(counted, self._banded(counts.numpy(), len(seeds) - 2), -1)

    def at(self, threshold: float) -> "Stability":
        """The same cosines judged at another threshold."""
        return replace(self, threshold=threshold)

    def both_ways(self) -> "Stability":
        """The same where only mutual matches count."""
        return replace(self, best_cosine=torch.where(self.mutual | self.best_cosine.isnan(), self.best_cosine, -1.0))

    def among(self, seeds: list[int]) -> "Stability":
        """What a study of only these seeds (positions) would have found."""
        index = torch.tensor(seeds)
        best_cosine, partner, runner_up = (tensor[index][:, index] for tensor in (self.best_cosine, self.partner, self.runner_up))
        return Stability(best_cosine, partner, runner_up, self.alive[index], self.threshold)

    def mean(self) -> Interval:
        """Mean stability of live features, with its jackknife interval over seeds."""
        return over_pairs(self.match_rates()).within(0, 1)

    def area(self) -> Interval:
        """The area under the curve of mean stability against the threshold, from 0 to 1, jackknifed over seeds.

        A feature is matched at all thresholds up to its best cosine, so the area is the mean of the best cosines above 0.
        """
        cosines = self.best_cosine.clamp(min=0).nanmean(2).numpy()
        return over_pairs(cosines)

    def ambiguous_share(self) -> Interval:
        """The share of matches that are ambiguous, jackknifed over seeds."""
        ambiguous, matched = self.ambiguous.sum(2).double().numpy(), self.matched.sum(2).double().numpy()

        def estimate(seeds: list[int]) -> float:
            pairs = np.ix_(seeds, seeds)
            return float(ambiguous[pairs].sum() / max(matched[pairs].sum(), 1))

        return jackknife(estimate, len(self.alive)).within(0, 1)

    def match_rates(self) -> Float[np.ndarray, "seed seed"]:
        """[s, t]: the share of the live features of s that reappear in t; NaN where t is s."""
        return self.weighted(np.ones(self.alive.shape))

    def weighted(self, weight: Float[np.ndarray, "seed d_sae"]) -> Float[np.ndarray, "seed seed"]:
        """[s, t]: what the features of s that reappear in t hold of a weight, as a share of all live ones'; NaN where t is s."""
        held = np.where(self.alive, weight, 0.0)
        with np.errstate(invalid="ignore"):  # a seed may hold nothing of it
            rates = np.einsum("sti,si->st", self.matched.numpy(), held) / held.sum(1, keepdims=True)
        np.fill_diagonal(rates, np.nan)
        return rates

    def band_among(self, seeds: list[int], stable: float = STABLE, unstable: float = UNSTABLE) -> Int[np.ndarray, "kept d_sae"]:
        """The bands in a study of only these seeds (positions), with as many misses, or matches, as the whole study allows.

        With shares in the place of counts, to leave a seed out would move the bands' edges and not only the features. With all
        seeds it is `band`.
        """
        band = self._banded(self._counts_among(seeds).numpy(), len(seeds) - 1, stable, unstable)
        return np.where(self.alive[seeds].numpy(), band, -1)

    def _banded(
        self, counts: Int[np.ndarray, "*any"], trials: int, stable: float = STABLE, unstable: float = UNSTABLE
    ) -> Int[np.ndarray, "*any"]:
        """The bands of counts out of fewer trials, with as many misses, or matches, as the whole study allows."""
        misses = self.trials - int(np.ceil((stable - ROUNDING) * self.trials))
        matches = int(np.floor((unstable + ROUNDING) * self.trials))
        return np.select([trials - counts <= misses, counts <= matches], [0, 2], default=1)

    def shares(self) -> dict[str, Interval]:
        """The share of live features in each band, jackknifed over seeds (`band_among`)."""
        among = cache(lambda kept: self.band_among(list(kept)))

        def share(number: int) -> Interval:
            def estimate(seeds: list[int]) -> float:
                band = among(tuple(seeds))
                return float((band == number).sum() / (band >= 0).sum())

            return jackknife(estimate, len(self.alive)).within(0, 1)

        return {name: share(number) for number, name in enumerate(BANDS)}

    def reliability(self) -> Interval:
        """How much of the variance of p over features is not chance: (S-1) / (S-1 + alpha + beta), by the beta-binomial fit.

        With the intraclass correlation 1 / (1 + alpha + beta) of a match it is Spearman and Brown's formula. Jackknifed over seeds;
        all fits tell it of as many trials as the whole study has.
        """

        def estimate(seeds: list[int]) -> float:
            fit = self._latent_among(seeds)
            return self.trials / (self.trials + fit.alpha + fit.beta)

        return jackknife(estimate, len(self.alive)).within(0, 1)

    def latent(self) -> LatentShares:
        """The beta-binomial fit to the counts of all live features."""
        return self._latent_among(list(range(len(self.alive))))

    def _latent_among(self, seeds: list[int]) -> LatentShares:
        """The same in a study of only these seeds."""
        return fit_beta_binomial(self._counts_among(seeds)[self.alive[seeds]].numpy(), len(seeds) - 1)

    def _counts_among(self, seeds: list[int]) -> Int[Tensor, "kept d_sae"]:
        """In how many of the others of these seeds (positions) each feature reappears: without a copy of the cosines."""
        return self.matched[seeds][:, seeds].sum(1)

    def latent_shares(self) -> dict[str, Interval]:
        """Shares of features whose *true* probability lies in the stable and in the unstable band, jackknifed over seeds."""
        seeds = len(self.alive)
        fitted = cache(lambda kept: self._latent_among(list(kept)))
        return {
            "stable": jackknife(lambda kept: fitted(tuple(kept)).above(STABLE), seeds).within(0, 1),
            "unstable": jackknife(lambda kept: fitted(tuple(kept)).below(UNSTABLE), seeds).within(0, 1),
        }

    def separation(self) -> Interval:
        """Reappearance rate of stable less that of unstable features, in a seed that had no say in the bands.

        For each pair (s, t) the bands of s come from the other seeds; the jackknife derives them again without each seed. NaN
        where a band is empty or S < 3, and without an interval for S = 3.
        """

        def estimate(kept: list[int]) -> float:
            band, matched = self.held_out_band_among(kept), self.matched[kept][:, kept].numpy()
            stable, unstable = (matched[band == BANDS.index(name)] for name in ("stable", "unstable"))
            return float(stable.mean() - unstable.mean()) if len(stable) and len(unstable) else float("nan")

        return jackknife(estimate, len(self.alive))


def _stacked(W_dec: Tensor | np.ndarray | Sequence[Tensor | np.ndarray]) -> Tensor:
    """What somebody has of several decoders, as one tensor. Raises `UserError` for decoders of several shapes."""
    if isinstance(W_dec, Tensor):
        return W_dec
    if isinstance(W_dec, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(W_dec))
    each = [_stacked(of_one) for of_one in W_dec]
    if len({of_one.shape for of_one in each}) > 1:
        shapes = ", ".join(str(list(of_one.shape)) for of_one in each[:3])
        raise UserError(f"W_dec: decoders of several shapes ({shapes}); `existing.compare` takes SAEs of several widths")
    return torch.stack(each) if each else torch.empty(0)


def stability(
    W_dec: Float[Tensor, "seed d_sae d_in"] | np.ndarray | Sequence[Tensor | np.ndarray],
    threshold: float = 0.7,
    alive: Bool[Tensor, "seed d_sae"] | np.ndarray | None = None,
) -> Stability:
    """Compare every seed's dictionary with every other's. Directions need not have unit length.

    Dead features (`alive` false), and directions of length zero, match nothing. Memory beside the result is a copy of the
    directions and, for each thread, `pairs.CHUNK * d_sae` cosines. Raises `UserError` for one seed, a threshold outside (0, 1],
    weights that are not finite, a decoder of zeros, or shapes that don't fit.
    """
    W_dec = _stacked(W_dec).detach().float()
    if W_dec.ndim != 3 or len(W_dec) < 2:
        raise UserError(
            f"W_dec: stability compares seeds and wants [seed, d_sae, d_in] with two seeds or more, not {list(W_dec.shape)}"
        )
    if not 0 < threshold <= 1:
        raise UserError(f"threshold: {threshold} is no cosine in (0, 1]; the usual one is 0.7")
    if not W_dec.isfinite().all():
        raise UserError("W_dec: holds NaN or infinite weights; leave that SAE out")
    seeds, d_sae, _ = W_dec.shape
    alive = torch.ones(seeds, d_sae, dtype=torch.bool) if alive is None else torch.as_tensor(alive).bool().cpu()
    if alive.shape != (seeds, d_sae):
        raise UserError(f"alive: give one flag a feature, {[seeds, d_sae]}, not {list(alive.shape)}")
    directed = (W_dec != 0).any(2).cpu()
    if not directed.any(1).all():
        raise UserError(f"W_dec: every direction of SAE {directed.any(1).int().argmin()} is zero; leave that SAE out")
    directions = F.normalize(W_dec, dim=2)
    return reappear(lambda s, t: cosines(directions[s], directions[t]), alive & directed, threshold, W_dec.device)


def reappear(
    similarities: Callable[[int, int], Similarities],
    alive: Bool[Tensor, "seed d_sae"],
    threshold: float,
    device: torch.device | str = "cpu",
) -> Stability:
    """The stability that follows from how alike the features of two seeds are, whatever that means.

    `similarities(s, t)` compares seeds s < t, on `device`; what it gives need not be cosines, but lies in [-1, 1].
    """
    seeds, d_sae = alive.shape
    best = torch.full((seeds, seeds, d_sae), torch.nan)
    partner = torch.full((seeds, seeds, d_sae), -1)
    runner_up = torch.full((seeds, seeds, d_sae), torch.nan)
    living = alive.to(device)

    def compare_pair(s: int, t: int) -> None:
        for (one, other), found in zip(((s, t), (t, s)), compare(similarities(s, t), living[s], living[t]), strict=True):
            dead = ~living[one]
            best[one, other] = found.similarity.masked_fill(dead, torch.nan)
            partner[one, other] = found.partner
            runner_up[one, other] = found.runner_up.masked_fill(dead, torch.nan)

    threads.each_pair(compare_pair, seeds, "matching", one_at_a_time=living.device.type != "cpu")
    return Stability(best, partner, runner_up, alive, threshold)


def band_of(probability: Float[np.ndarray, "*any"]) -> Int[np.ndarray, "*any"]:
    """The band of each probability as an index into BANDS; -1 for NaN."""
    band = np.select([probability >= STABLE - ROUNDING, probability <= UNSTABLE + ROUNDING], [0, 2], default=1)
    return np.where(np.isnan(probability), -1, band)


def at_equal_frequency(
    null: Stability,
    weight: Float[np.ndarray, "seed d_sae"],
    frequency: Float[np.ndarray, "seed d_sae"],
    like_weight: Float[np.ndarray, "like_seed like_d_sae"],
    like_frequency: Float[np.ndarray, "like_seed like_d_sae"],
) -> Interval:
    """How much of a weight of a null's features would reappear, if it were spread over firing frequencies as that of others is.

    Direct standardisation: the weight within each bin of log frequency, a quarter of a decade, is scaled to what the others hold in
    that bin. Bins in which the null holds nothing take no part. Dead features have weight 0.
    """
    bins, like_bins = (np.floor(4 * np.log10(np.maximum(each, 1e-12))) for each in (frequency, like_frequency))
    scaled = np.zeros_like(weight)
    for place in np.unique(bins):
        inside = bins == place
        if weight[inside].sum() > 0:
            scaled[inside] = weight[inside] * like_weight[like_bins == place].sum() / weight[inside].sum()
    return over_pairs(null.weighted(scaled)).within(0, 1) if scaled.any() else Interval(*[float("nan")] * 3)
