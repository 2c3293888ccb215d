"""As the paper asks, of a cell with seeds enough: bands at 0.95 and 0.05, the first seed or every seed as the anchor, and what is
reported of its answers by readers of its full text (PAPER.md, second hand).
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors.numpy import load_file
from torch import Tensor

from sae_stability import ablation
from sae_stability.ablation.controls import Name, own_ranks, some_of
from sae_stability.experiments import ensembles, explanations, impacts, matching, quality, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.explanations import EXPLAINED_SEEDS
from sae_stability.explanations import Rules
from sae_stability.files import save_arrays
from sae_stability.matching import BANDS as matching_bands
from sae_stability.matching import Stability
from sae_stability.statistics import Interval, bootstrap_ratio, jackknife, over_pairs, resampled
from sae_stability.study import Cell, Study
from sae_stability.subspaces import effective_rank

SEEDS = 21  # from here on a share of the others can be between 0.95 and 1
STABLE, UNSTABLE = 0.95, 0.05
BANDS = ("stable", "unstable")
TIMES = 4  # as many unstable features are masked as stable ones
SITE = {"mean": "the site at its mean", "zero": "the site at zero"}
COSTS: dict[Literal["reconstruction", "prediction"], str] = {
    "reconstruction": "explained variance lost",
    "prediction": "cross-entropy added, nats",
}
"""What masking is read by."""
PART_OF_WORD = ("words that begin with", "words that end with")
"""How the rules engine names a part of a word; the reported explanations say *substring*."""
REPORTED = {
    ("frequency", "unstable"): "0.18 %",
    ("frequency", "stable"): "0.44 %",
    ("part of a word", "unstable"): "38.9 %",
    ("part of a word", "stable"): "11.3 %",
    ("effective rank over d", "unstable"): "0.59 to 0.65",
    ("effective rank over d", "stable"): "0.80 to 0.81",
    ("agreement of one to one and many to one", "matched"): "0.978",
    ("explained variance lost", "unstable"): "little",
    ("explained variance lost", "stable"): "much",
}
"""Reported by readers of the paper's full text, of other models and SAEs, and not checked."""


def bands(matched: Stability, seeds: list[int]) -> dict[str, Bool[Tensor, "kept d_sae"]]:
    """The features of some seeds (positions) that are stable and unstable by the paper's bounds (`Stability.band_among`)."""
    band = torch.from_numpy(matched.band_among(seeds, STABLE, UNSTABLE))
    return {name: band == matching_bands.index(name) for name in BANDS}


def masked(matched: Stability, seeds: list[int] | None = None) -> dict[Name, Bool[Tensor, "kept d_sae"]]:
    """N random stable features of each seed, and `TIMES` N random unstable ones: as many as both bands allow.

    Of some seeds (positions) or of all, with bands as `bands` derives them.
    """
    kept = list(range(len(matched.alive))) if seeds is None else seeds
    found, ranks = bands(matched, kept), own_ranks(kept, matched.alive.shape[1])
    counts = torch.minimum(found["stable"].sum(1), found["unstable"].sum(1) // TIMES)
    return {("masked", band): some_of(found[band], times * counts, ranks) for band, times in (("stable", 1), ("unstable", TIMES))}


def compute(results: Results, folder: Path) -> None:
    """Mask stable and unstable features of every seed, and read the explained variance and the cross-entropy."""
    ensemble, members = ensembles.ensemble(results), masked(matching.stability(results))
    site = texts.reading(results, results.study.ablation_tokens)
    residuals = ablation.on_reconstruction(encoded(results), site.contexts.cluster[site.contexts.is_text], members)
    predicted = ablation.on_prediction(site, ensemble, members, {"removed": list(members)})
    arrays = {"total": residuals.total, "intact": residuals.intact, "clean": predicted.clean, "tokens": predicted.tokens}
    arrays |= {ablated: predicted.nats[ablated,] for ablated in SITE}
    for name, member in members.items():
        arrays[f"reconstruction/{name[1]}"] = residuals.removed[name]
        arrays[f"prediction/{name[1]}"] = np.stack([predicted.nats["removed", *name, seed] for seed in range(len(ensemble.seeds))])
        arrays[f"features/{name[1]}"] = member.sum(1).numpy()
    save_arrays(folder / "masked.safetensors", arrays)


def asked(results: Results) -> pd.DataFrame:
    """One row per quantity, set of features and choice of anchors: our value with its interval, and what is reported.

    Anchors are the `first` seed or `every` one. Over all of them intervals are jackknives with bands and masked sets derived again;
    for what masking costs, documents are resampled too. What is of one seed alone has no interval over seeds.
    """
    matched, arrays = matching.stability(results), load_file(results.folder("asked") / "masked.safetensors")
    everyone = list(range(len(matched.alive)))
    frequency, directions = quality.fit(results).frequency.numpy(), ensembles.ensemble(results).W_dec
    banded = cache(lambda kept: bands(matched, list(kept)))  # derived again for each seed that is left out
    as_many = cache(lambda kept: _as_many(banded(kept), own_ranks(list(kept), directions.shape[1])))
    sets = cache(lambda kept: masked(matched, list(kept)))
    rows: list[dict] = []

    def add(quantity: str, of: str, anchors: str, value: Interval) -> None:
        row = {"quantity": quantity, "of": of, "anchors": anchors, **interval_columns("value", value)}
        rows.append(row | {"reported": REPORTED.get((quantity, of), "")})

    def of_seeds(quantity: str, of: str, sets: Callable[[list[int]], Tensor], statistic: Callable[[int, Tensor], float]) -> None:
        """A statistic of a seed and a set of its features, of the first seed and averaged over all."""
        add(quantity, of, "first", _alone(statistic(0, sets(everyone)[0])))

        def estimate(kept: list[int]) -> float:
            values = [statistic(seed, member) for seed, member in zip(kept, sets(kept), strict=True)]
            return float(np.mean([value for value in values if np.isfinite(value)] or [np.nan]))

        add(quantity, of, "every", jackknife(estimate, len(everyone)))

    def band_of(band: str, kept: list[int]) -> Tensor:
        return banded(tuple(kept))[band]

    def some_of(band: str, kept: list[int]) -> Tensor:
        return as_many(tuple(kept))[band]

    def masks_of(band: str, kept: list[int]) -> Tensor:
        return sets(tuple(kept))["masked", band]

    def share(seed: int, member: Tensor) -> float:
        return float(member.sum() / matched.alive[seed].sum())

    def mean_frequency(seed: int, member: Tensor) -> float:
        return float(frequency[seed, member].mean()) if member.any() else np.nan

    def rank(seed: int, member: Tensor) -> float:
        return effective_rank(directions[seed, member]) / directions.shape[2]

    def random_rank(seed: int, member: Tensor) -> float:
        drawn = torch.randn(int(member.sum()), directions.shape[2], generator=torch.Generator().manual_seed(seed))
        return effective_rank(drawn) / directions.shape[2]

    for band in BANDS:
        of_seeds("share of the features", band, partial(band_of, band), share)
        of_seeds("frequency", band, partial(band_of, band), mean_frequency)
    for band in BANDS:
        of_seeds("effective rank over d", band, partial(some_of, band), rank)
    of_seeds("effective rank over d", "random directions", partial(some_of, "stable"), random_rank)
    of_seeds("rows over d", "each", partial(some_of, "stable"), lambda seed, member: float(member.sum()) / directions.shape[2])
    add("agreement of one to one and many to one", "matched", "every", over_pairs(agreement(results)))
    for band in BANDS:
        of_seeds("features masked", band, partial(masks_of, band), lambda _, member: float(member.sum()))
    single = impacts.single(results)
    for measure, what in COSTS.items():
        weight = single.weight(measure) / (arrays["total"].sum() if measure == "reconstruction" else 1.0)
        for band in BANDS:
            first, every = _lost(arrays, measure, band, partial(masks_of, band), weight)
            add(what, band, "first", first)
            add(what, band, "every", every)
    for ablated, of in SITE.items():
        add("cross-entropy added, nats", of, "every", bootstrap_ratio(arrays[ablated] - arrays["clean"], arrays["tokens"]))
    for band in BANDS:
        add("part of a word", band, f"first {EXPLAINED_SEEDS}", _parts_of_words(results, band))
    return pd.DataFrame(rows)


def agreement(results: Results) -> Float[np.ndarray, "seed seed"]:
    """[s, t]: of the features of s that reappear in t by the best cosine or one to one, the share that does by both."""
    best, paired = (matching.stability(results, "real", criterion).matched for criterion in ("decoder", "one-to-one"))
    with np.errstate(invalid="ignore"):
        shared = ((best & paired).sum(2) / (best | paired).sum(2)).double().numpy()
    np.fill_diagonal(shared, np.nan)
    return shared


def _lost(
    arrays: dict[str, np.ndarray],
    measure: str,
    band: str,
    members: Callable[[list[int]], Bool[Tensor, "kept d_sae"]],
    weight: Float[np.ndarray, "seed d_sae"],
) -> tuple[Interval, Interval]:
    """What masking costs, with the first seed as the anchor (documents are resampled) and with every one (and seeds left out).

    With a seed left out, `members` gives other sets. What masking these would cost is what was measured, moved by what the sets
    gain or lose in `weight`: what each feature costs alone (as in `ablation.estimates`). Not defined where nothing was masked.
    """
    start, size = (arrays[name] for name in (("intact", "total") if measure == "reconstruction" else ("clean", "tokens")))
    lost, there = arrays[f"{measure}/{band}"] - start, arrays[f"features/{band}"] > 0
    by_seed, weights = np.where(there, lost.sum(1) / size.sum(), np.nan), resampled(len(size))
    if not there[0]:
        return _alone(np.nan), _alone(np.nan)

    def additive(kept: list[int]) -> Float[np.ndarray, "kept"]:
        return (weight[kept] * members(kept).numpy()).sum(1)

    everyone = list(range(len(by_seed)))
    measured = additive(everyone)

    def estimate(kept: list[int]) -> float:
        return float(np.nanmean(by_seed[kept] + additive(kept) - measured[kept]))

    drawn = ((weights @ lost[there].T) / (weights @ size)[:, None]).mean(1)
    return bootstrap_ratio(lost[0], size), jackknife(estimate, len(by_seed), drawn)


def _as_many(of_bands: dict[str, Bool[Tensor, "seed d_sae"]], ranks: Float[Tensor, "seed d_sae"]) -> dict[str, Tensor]:
    """As many random features of each band, since the rank of a set grows with its size."""
    counts = torch.minimum(*(member.sum(1) for member in of_bands.values()))
    return {band: some_of(member, counts, ranks) for band, member in of_bands.items()}


def _parts_of_words(results: Results, band: str) -> Interval:
    """Of the features of a band that the rules engine explains, the share that it explains by a part of a word."""
    explained, matched = explanations.by_band(results), matching.stability(results)
    by_rules = explained[explained["engine"] == Rules.name]
    named = by_rules["text"].str.contains("|".join(PART_OF_WORD)).to_numpy()
    place = by_rules["seed"].map(ensembles.ensemble(results).seeds.index).to_numpy()

    def estimate(kept: list[int]) -> float:
        inside, there = bands(matched, kept)[band].numpy(), np.isin(place, kept)
        chosen = np.zeros(len(named), dtype=bool)
        chosen[there] = inside[np.searchsorted(kept, place[there]), by_rules["feature"].to_numpy()[there]]
        return float(named[chosen].mean()) if chosen.any() else np.nan

    return jackknife(estimate, len(matched.alive)).within(0, 1)


def _alone(value: float) -> Interval:
    return Interval(float(value), np.nan, np.nan)


def _many(study: Study, cell: Cell) -> bool:
    return len(cell.seed_list) >= SEEDS and is_main(study, cell)


EXPERIMENT = Experiment(
    "asked",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens", "ablation_tokens"),
    tables={"asked": asked},
    report_after=("explanations", "impacts", "quality"),
    asked=_many,
)
