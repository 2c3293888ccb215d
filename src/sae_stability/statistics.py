"""Intervals and fits that respect how the data came about.

A seed takes part in every pair, and the bands of one seed are made of all the others: numbers of seeds are never independent. So
whatever depends on matches or bands gets a delete-one-seed jackknife, in which bands are derived again without the seed. Clusters
of documents are resampled for what is averaged over text, and parts of them left out in turn for what has to be found again; both
distances add in squares. Features are never resampled as if independent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import optimize, sparse, special, stats
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree

SAMPLES = 1000  # of the documents, drawn with replacement
DENSE = 2048**2  # possible pairs up to which all are looked at: any two sets of features of an SAE of 4,096


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def within(self, low: float, high: float) -> "Interval":
        """The same with its ends cut to the range that the quantity can take."""
        return Interval(self.value, max(self.low, low), min(self.high, high))

    def widened(self, reach: float) -> "Interval":
        """The same where an error that is independent of this one reaches as far on either side: their squares add."""
        below, above = np.hypot(self.value - self.low, reach), np.hypot(self.high - self.value, reach)
        return Interval(self.value, float(self.value - below), float(self.value + above))

    def __format__(self, spec: str) -> str:
        """The value with its interval, or alone where too few seeds give none."""
        if np.isnan(self.value):
            return "not defined"
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if np.isfinite(self.low) else ""
        return f"{self.value:{spec}}{ends}"


@dataclass(frozen=True)
class LatentShares:
    """A beta-binomial fit: every feature has a true probability of coming back, drawn from Beta(alpha, beta)."""

    alpha: float
    beta: float

    def above(self, probability: float) -> float:
        """The share of features whose true probability is at least `probability`."""
        return float(stats.beta.sf(probability, self.alpha, self.beta))

    def below(self, probability: float) -> float:
        return float(stats.beta.cdf(probability, self.alpha, self.beta))

    def expected_counts(self, trials: int) -> Float[np.ndarray, "trials_plus_1"]:
        """The share of features that the fit expects to come back in 0, 1, ..., `trials` seeds."""
        return stats.betabinom.pmf(np.arange(trials + 1), trials, self.alpha, self.beta)


def jackknife(
    estimate: Callable[[list[int]], float],
    seeds: int,
    drawn: Float[np.ndarray, "sample"] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Delete-one-seed jackknife with t(S-1) quantiles (Efron & Stein 1981, doi:10.1214/aos/1176345462), and the text beside it.

    `estimate` takes the positions of the seeds to use, and derives all that depends on seeds from these alone; with one seed
    deleted it must still have two. `drawn` are estimates of all seeds on resampled documents: on each side the distance of their
    quantile adds in squares, their centre taken out. A seed without which the estimate is not defined makes the ends NaN, and so
    do fewer than 3 seeds.
    """
    everyone = list(range(seeds))
    value = float(estimate(everyone))
    if seeds < 3:
        return Interval(value, float("nan"), float("nan"))
    reach = reach_without([estimate([seed for seed in everyone if seed != left_out]) for left_out in everyone], confidence)
    below, above = reach, reach
    if drawn is not None:
        tail = (1 - confidence) / 2
        low, centre, high = np.quantile(drawn, [tail, 0.5, 1 - tail])
        below, above = np.hypot(reach, centre - low), np.hypot(reach, high - centre)
    return Interval(value, float(value - below), float(value + above))


def jackknifed_mean(values: Iterable[float]) -> Interval:
    """The mean of some values, each left out in turn: where they are independent of one another that is Student's interval."""
    known = np.fromiter(values, dtype=float)
    return jackknife(lambda kept: float(known[kept].mean()), len(known))


def reach_without(without: Sequence[float], confidence: float = 0.95) -> float:
    """Half the width of an interval, from estimates without each of n groups in turn (seeds, or parts of a text): delete-a-group
    jackknife with t(n-1) quantiles (Kott 2001, Journal of Official Statistics 17, 521). NaN for fewer than two, or where one is not
    defined."""
    if len(without) < 2:
        return float("nan")
    estimates, groups = np.asarray(without, dtype=float), len(without)
    error = np.sqrt((groups - 1) / groups * ((estimates - estimates.mean()) ** 2).sum())
    return float(stats.t.ppf(0.5 + confidence / 2, groups - 1) * error)


def over_pairs(
    values: Float[np.ndarray, "seed seed"], drawn: Float[np.ndarray, "sample"] | None = None, confidence: float = 0.95
) -> Interval:
    """The mean of a pair statistic, jackknifed over seeds. [s, t] is that of seeds s and t; NaN where there is none."""

    def estimate(seeds: list[int]) -> float:
        among = values[np.ix_(seeds, seeds)]
        known = np.isfinite(among)
        return float(among[known].mean()) if known.any() else float("nan")

    return jackknife(estimate, len(values), drawn, confidence)


def difference(one: Interval, other: Interval) -> Interval:
    """One estimate less another that is independent of it: their squared half-widths add."""
    value = one.value - other.value
    reach = float(np.hypot((one.high - one.low) / 2, (other.high - other.low) / 2))
    return Interval(value, value - reach, value + reach)


def binomial_interval(successes: Int[np.ndarray, "*any"], trials: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Exact interval of a probability (Clopper & Pearson 1934, doi:10.1093/biomet/26.4.404): its low and high ends."""
    tail = (1 - confidence) / 2
    successes = np.asarray(successes, dtype=float)
    low = np.where(successes > 0, stats.beta.ppf(tail, successes, trials - successes + 1), 0.0)
    high = np.where(successes < trials, stats.beta.ppf(1 - tail, successes + 1, trials - successes), 1.0)
    return low, high


def fit_beta_binomial(counts: Int[np.ndarray, "feature"], trials: int) -> LatentShares:
    """Maximum likelihood fit of the probabilities behind `counts` out of `trials` (Skellam 1948)."""
    tally = np.bincount(np.asarray(counts, dtype=int), minlength=trials + 1)
    successes = np.arange(trials + 1)

    def loss(logs: Float[np.ndarray, "2"]) -> tuple[float, Float[np.ndarray, "2"]]:
        """Minus the log likelihood, and its gradient in the logarithms of alpha and beta."""
        alpha, beta = np.exp(logs)
        likelihood = special.betaln(successes + alpha, trials - successes + beta) - special.betaln(alpha, beta)
        total = special.digamma(alpha + beta) - special.digamma(trials + alpha + beta)
        by_alpha = special.digamma(successes + alpha) - special.digamma(alpha) + total
        by_beta = special.digamma(trials - successes + beta) - special.digamma(beta) + total
        return -float(tally @ likelihood), -np.array([alpha * (tally @ by_alpha), beta * (tally @ by_beta)])

    # Beyond these bounds the fit is a point mass or pure extremes, and the likelihood is flat.
    found = optimize.minimize(loss, x0=np.zeros(2), jac=True, bounds=[(-7, 7)] * 2, method="L-BFGS-B")
    alpha, beta = np.exp(found.x)
    return LatentShares(float(alpha), float(beta))


def bootstrap_ratio(
    numerator: Real[np.ndarray, "document"],
    denominator: Real[np.ndarray, "document"],
    transform: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio,
    samples: int = SAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """`transform(sum(numerator) / sum(denominator))`, with documents resampled (percentile interval)."""
    weights = resampled(len(numerator), samples)
    drawn = transform((weights @ numerator) / (weights @ denominator))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(transform(numerator.sum() / denominator.sum())), float(low), float(high))


def matched_pairs(
    group: Float[np.ndarray, "a covariate"], others: Float[np.ndarray, "b covariate"], caliper: float
) -> tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"]]:
    """Pair members of a group one to one with others whose covariates all lie within `caliper` of their own.

    As many pairs as can be, and among those the closest (optimal matching; Rosenbaum 1989, doi:10.1080/01621459.1989.10478868).
    Gives positions in either. What has a covariate that is not finite is nobody's match.

    Up to `DENSE` possible pairs all are looked at; above, only those within the caliper are held in memory. The optimum is the
    same; where several are, it may be another of them.
    """
    if len(group) * len(others) <= DENSE:
        return _closest_of_all(group, others, caliper)
    return _closest_within(group, others, caliper)


def _closest_of_all(group: np.ndarray, others: np.ndarray, caliper: float) -> tuple[np.ndarray, np.ndarray]:
    """By the assignment of least cost on the matrix of all distances."""
    near, squares = np.ones((len(group), len(others)), dtype=bool), np.zeros((len(group), len(others)))
    for ours, theirs in zip(group.T, others.T, strict=True):  # few covariates: one after another, and not an array of all
        differences = np.abs(ours[:, None] - theirs)
        near &= differences <= caliper
        squares += differences**2
    distance = np.where(near, np.sqrt(squares), 0)
    rows, columns = linear_sum_assignment(np.where(near, distance, _out_of_reach(distance, near.shape)))
    kept = near[rows, columns]
    return rows[kept], columns[kept]


def _closest_within(group: np.ndarray, others: np.ndarray, caliper: float) -> tuple[np.ndarray, np.ndarray]:
    """By a sparse matching of those within the caliper, where everyone may also stay alone, at the cost of a pair out of reach."""
    members, candidates = (np.flatnonzero(np.isfinite(covariates).all(1)) for covariates in (group, others))
    tree = KDTree(group[members])
    near = tree.sparse_distance_matrix(KDTree(others[candidates]), caliper, p=np.inf, output_type="coo_matrix")
    distance = np.linalg.norm(group[members[near.row]] - others[candidates[near.col]], axis=1)
    # All costs are raised by 1, which changes no optimum as every member has one: SciPy takes 0 for no edge.
    costs = sparse.coo_array((1 + distance, (near.row, near.col)), shape=near.shape)
    alone = sparse.diags_array(np.full(len(members), 1 + _out_of_reach(distance, near.shape)))
    rows, columns = min_weight_full_bipartite_matching(sparse.hstack([costs, alone], format="csr"))
    paired = columns < len(candidates)
    return members[rows[paired]], candidates[columns[paired]]


def _out_of_reach(distance: np.ndarray, shape: tuple[int, int]) -> float:
    """A cost above that of all pairs within reach together."""
    return float(1 + distance.max(initial=0) * (min(shape) + 1))


@lru_cache(maxsize=4)  # hundreds of quantities of a study are resampled alike, from a few choices of documents
def resampled(count: int, samples: int = SAMPLES) -> Float[np.ndarray, "sample document"]:
    """How often each of `count` documents is drawn, in samples with replacement."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=samples).astype(float)
