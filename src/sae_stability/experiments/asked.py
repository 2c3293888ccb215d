"""As the paper asks, of a cell with seeds enough: bands at 0.95 and 0.05, the first seed or every seed as the anchor, and what is
reported of its answers by readers of its full text (PAPER.md, second hand).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors.numpy import load_file
from torch import Tensor

from sae_stability import ablation
from sae_stability.evaluation import Encoded
from sae_stability.experiments import ensembles, explanations, matching, quality, texts
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.experiments.matching import CODE_TOKENS
from sae_stability.explanations import Rules
from sae_stability.files import save_arrays
from sae_stability.matching import Stability
from sae_stability.statistics import Interval, bootstrap_ratio, jackknife, over_pairs, resampled
from sae_stability.study import Cell, Study

SEEDS = 21  # from here on a share of the others can be between 0.95 and 1
STABLE, UNSTABLE = 0.95, 0.05
BANDS = ("stable", "unstable")
TIMES = 4  # as many unstable features are masked as stable ones
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
    """The live features of some seeds (positions) whose share of matches among them is at least `STABLE`, or at most `UNSTABLE`.

    As in `Stability.band_among`, as many misses are allowed as with all seeds.
    """
    counts, alive = matched.matched[seeds][:, seeds].sum(1), matched.alive[seeds]
    misses, matches = matched.trials - int(np.ceil(STABLE * matched.trials)), int(UNSTABLE * matched.trials)
    return {"stable": alive & (counts >= len(seeds) - 1 - misses), "unstable": alive & (counts <= matches)}


def masked(matched: Stability) -> dict[tuple[str, str], Bool[Tensor, "seed d_sae"]]:
    """N random stable features of each seed, and `TIMES` N random unstable ones: as many as both bands allow. And all live ones."""
    found = bands(matched, list(range(len(matched.alive))))
    counts = torch.minimum(found["stable"].sum(1), found["unstable"].sum(1) // TIMES)
    ranks = torch.from_numpy(np.stack([np.random.default_rng(seed).random(matched.alive.shape[1]) for seed in range(len(counts))]))
    members = {("masked", ""): matched.alive}
    for band, times in (("stable", 1), ("unstable", TIMES)):
        order = ranks.masked_fill(~found[band], torch.inf).argsort(1).argsort(1)
        members["masked", band] = found[band] & (order < times * counts[:, None])
    return members


def compute(results: Results, folder: Path) -> None:
    """Mask stable and unstable features of every seed, and read the explained variance and the cross-entropy."""
    ensemble, members = ensembles.ensemble(results), masked(matching.stability(results))
    site = texts.reading(results, results.study.ablation_tokens)
    encoded = Encoded.of(ensemble, texts.activations(results, "evaluation").first(CODE_TOKENS))
    residuals = ablation.on_reconstruction(encoded, site.contexts.cluster[site.contexts.is_text], members)
    predicted = ablation.on_prediction(site, ensemble, members, {"removed": list(members)})
    arrays = {"total": residuals.total, "intact": residuals.intact, "clean": predicted.clean, "tokens": predicted.tokens}
    for name in members:
        arrays[f"reconstruction/{name[1]}"] = residuals.removed[name]
        arrays[f"prediction/{name[1]}"] = np.stack([predicted.nats["removed", *name, seed] for seed in range(len(ensemble.seeds))])
    save_arrays(folder / "masked.safetensors", arrays)


def asked(results: Results) -> pd.DataFrame:
    """One row per quantity, band and choice of anchors (`first` or `every`): our value with its interval, and what is reported."""
    matched = matching.stability(results)
    everyone = list(range(len(matched.alive)))
    of_bands = bands(matched, everyone)
    frequency, directions = quality.fit(results).frequency.numpy(), ensembles.ensemble(results).W_dec
    equal = _as_many(of_bands)
    rows: list[dict] = []

    def add(quantity: str, band: str, anchors: str, value: Interval) -> None:
        row = {"quantity": quantity, "band": band, "anchors": anchors, **interval_columns("value", value)}
        rows.append(row | {"reported": REPORTED.get((quantity, band), "")})

    def of_seeds(quantity: str, band: str, statistic: Callable[[int, np.ndarray], float]) -> None:
        """A statistic of a seed and its band, of the first seed alone and averaged over all: with bands derived again."""
        add(quantity, band, "first", _alone(statistic(0, of_bands[band][0].numpy())))

        def estimate(kept: list[int]) -> float:
            members = bands(matched, kept)[band]
            return float(np.nanmean([statistic(seed, members[place].numpy()) for place, seed in enumerate(kept)]))

        add(quantity, band, "every", jackknife(estimate, len(everyone)))

    for band in BANDS:
        of_seeds("share of the features", band, lambda seed, member: member.sum() / matched.alive[seed].sum().item())
        of_seeds("frequency", band, lambda seed, member: frequency[seed, member].mean() if member.any() else np.nan)
    for band in BANDS:
        ranks = np.array([effective_rank(directions[seed, equal[band][seed]]) for seed in everyone]) / directions.shape[2]
        add("effective rank over d", band, "first", _alone(ranks[0]))
        add("effective rank over d", band, "every", _averaged(ranks))
    add("agreement of one to one and many to one", "matched", "every", over_pairs(agreement(results)))
    for measure, what in (("reconstruction", "explained variance lost"), ("prediction", "cross-entropy added, nats")):
        for band in BANDS:
            first, every = _lost(results, measure, band)
            add(what, band, "first", first)
            add(what, band, "every", every)
    for band, (count, of) in _parts_of_words(results, of_bands).items():
        add("part of a word", band, "first", _alone(count / of if of else np.nan))
    return pd.DataFrame(rows)


def effective_rank(rows: Float[Tensor, "row d_in"]) -> float:
    """The exponential of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(torch.nn.functional.normalize(rows.double(), dim=1)).numpy()
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def agreement(results: Results) -> Float[np.ndarray, "seed seed"]:
    """[s, t]: of the features of s that reappear in t by the best cosine or one to one, the share that does by both."""
    best, paired = (matching.stability(results, "real", criterion).matched for criterion in ("decoder", "one-to-one"))
    with np.errstate(invalid="ignore"):
        shared = ((best & paired).sum(2) / (best | paired).sum(2)).double().numpy()
    np.fill_diagonal(shared, np.nan)
    return shared


def _lost(results: Results, measure: str, band: str) -> tuple[Interval, Interval]:
    """What masking costs, with the first seed as the anchor (documents are resampled) and with every one (and seeds left out)."""
    arrays = load_file(results.folder("asked") / "masked.safetensors")
    start, size = (arrays[name] for name in (("intact", "total") if measure == "reconstruction" else ("clean", "tokens")))
    lost = arrays[f"{measure}/{band}"] - start
    by_seed, weights = lost.sum(1) / size.sum(), resampled(len(size))
    drawn = ((weights @ lost.T) / (weights @ size)[:, None]).mean(1)
    return bootstrap_ratio(lost[0], size), _averaged(by_seed, drawn)


def _as_many(of_bands: dict[str, Bool[Tensor, "seed d_sae"]]) -> dict[str, Bool[Tensor, "seed d_sae"]]:
    """As many random features of each band, since the rank of a set grows with its size."""
    counts = torch.minimum(*(member.sum(1) for member in of_bands.values()))
    chosen = {}
    for band, member in of_bands.items():
        ranks = torch.from_numpy(np.random.default_rng(0).random(member.shape)).masked_fill(~member, torch.inf)
        chosen[band] = member & (ranks.argsort(1).argsort(1) < counts[:, None])
    return chosen


def _parts_of_words(results: Results, of_bands: dict[str, Bool[Tensor, "seed d_sae"]]) -> dict[str, tuple[int, int]]:
    """Of each band, how many features the rules engine explains by a part of a word, and how many it explains at all."""
    explained, seeds = explanations.by_band(results), ensembles.ensemble(results).seeds
    by_rules = explained[explained["engine"] == Rules.name]
    named = by_rules["text"].str.contains("|".join(PART_OF_WORD)).to_numpy()
    at = by_rules["seed"].map(seeds.index).to_numpy(), by_rules["feature"].to_numpy()
    inside = {band: member.numpy()[at] for band, member in of_bands.items()}
    return {band: (int((named & there).sum()), int(there.sum())) for band, there in inside.items()}


def _averaged(by_seed: Float[np.ndarray, "seed"], drawn: Float[np.ndarray, "sample"] | None = None) -> Interval:
    return jackknife(lambda kept: float(by_seed[kept].mean()), len(by_seed), drawn)


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
    report_after=("explanations", "quality"),
    asked=_many,
)
