"""Do features come back under another seed (C1)? Stability feature by feature, its bands, and what it depends on."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from sae_stability.experiments import ensembles, families, matching, quality, texts
from sae_stability.experiments.columns import each_kind, interval_columns
from sae_stability.experiments.experiment import Experiment, Results, Tables
from sae_stability.language.activations import gaussian
from sae_stability.ledger import NOWHERE, OTHERWISE, Condition, Rule, judged, named_interval
from sae_stability.matching import BANDS, CRITERIA, Stability, at_equal_frequency, band_of, calibrate, mean_at, mean_mcc
from sae_stability.matching import stability as compare
from sae_stability.matching.criteria import Calibration
from sae_stability.saes import variant
from sae_stability.statistics import difference

NULL_SHARE = 0.05  # at the calibrated threshold the surrogate's match rate is at most this share of the real one
REFERENCE_SEEDS = 3  # of random directions and untrained SAEs
SUBSETS = 8  # of seeds, that stand for smaller studies
EVERY = 12  # seeds up to which every smaller study is looked at; beyond, those whose bands are cut exactly, and the whole
GROWN = 12  # the first seeds, whose decoders are compared as training goes
OUTSIDE = 20  # seeds outside of a smaller study that tell how far its p is off
THRESHOLDS = np.round(np.arange(0.3, 1.0, 0.02), 2)

RELIABLE = 0.7
SMALLEST_BAND = 0.05
C1 = (
    Rule(
        "C1",
        "reliability of feature stability: how much of its variance over features is not chance, at this number of seeds",
        f"supported in this model if the 95 % intervals over seeds lie above their bounds: the statistic above {RELIABLE}, and the "
        "latent shares of features whose probability of coming back is at least 0.9, and at most 0.1, above "
        f"{SMALLEST_BAND:.0%} each; {OTHERWISE}",
    ),
    Rule(
        "C1",
        "mean stability less that of the surrogate ensemble",
        "supported in this model if the 95 % intervals over seeds lie above 0, at the threshold and at the calibrated one; "
        f"{OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C1",
        "mean stability less that of the surrogate ensemble, if its features fired as often",
        f"supported in this model if the 95 % interval over seeds lies above 0; {OTHERWISE}",
        "beyond energy and frequency",
    ),
)


def features(results: Results) -> pd.DataFrame:
    """One row per feature: how often it fires, and in how many of the other seeds it comes back."""
    return each_kind(results.cell.kinds, lambda kind: features_at(results, kind, results.cell.threshold))


def features_at(results: Results, kind: str, threshold: float) -> pd.DataFrame:
    """The features of the ensemble, or of one of its nulls, at a threshold."""
    matched, seeds = matching.stability(results, kind).at(threshold), ensembles.ensemble(results, kind).seeds
    low, high = matched.interval
    count, d_sae = matched.alive.shape
    columns = {
        "alive": matched.alive.numpy(),
        "frequency": quality.fit(results, kind).frequency.numpy(),
        "matches": matched.counts.numpy(),
        "stability": matched.probability.numpy(),
        "stability_low": low,
        "stability_high": high,
        "band": np.array([*BANDS, "dead"])[matched.band],
        "mean_best_cosine": matched.best_cosine.nanmean(1).numpy(),
        "ambiguous": matched.ambiguous.sum(1).numpy(),
        "nearest_within": matching.nearest(results, kind).numpy(),
        "family": families.families(results, kind).family,
    }
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
    table.insert(0, "seed", np.repeat(seeds, d_sae))
    table.insert(1, "feature", np.tile(np.arange(d_sae), count))
    table.insert(5, "trials", matched.trials)
    return table


def criteria(results: Results) -> pd.DataFrame:
    """One row per criterion and kind: what reappears by it, and how far it agrees with the default."""
    rows = []
    real, surrogate = (matching.by_criterion(results, kind) for kind in ("real", "surrogate"))
    calibrated = {criterion: calibrate(real[criterion], surrogate[criterion], NULL_SHARE) for criterion in CRITERIA}
    for kind in results.cell.kinds:
        default = matching.stability(results, kind)
        for criterion, matched in matching.by_criterion(results, kind).items():
            shares = matched.shares()
            both = default.alive & matched.alive
            ours, theirs = (each.probability[both].numpy() for each in (default, matched))
            row = {"kind": kind, "criterion": criterion, "threshold": matched.threshold}
            row |= interval_columns("mean_stability", matched.mean())
            row |= interval_columns("stable_share", shares["stable"]) | interval_columns("unstable_share", shares["unstable"])
            row |= calibrated_columns(matched, calibrated[criterion], kind)
            rows.append(row | {"same_band": float((band_of(ours) == band_of(theirs)).mean())})
    return pd.DataFrame(rows)


def calibrated_columns(matched: Stability, calibration: Calibration, kind: str) -> dict[str, float]:
    """The calibrated threshold and the mean stability there, of the ensemble or one of its nulls: NaN where there is no such
    threshold. The interval knows that the threshold follows from the seeds."""
    everyone = list(range(len(matched.alive)))
    own: dict[str, Callable[[float, list[int], list[int]], float]] = {
        "real": lambda at, ours, _: mean_at(matched, at, ours),
        "surrogate": lambda at, _, theirs: mean_at(matched, at, theirs),
    }
    mean = calibration.interval(own.get(kind, lambda at, *_: mean_at(matched, at, everyone)))
    if kind not in own and np.isfinite(calibration.threshold):  # seeds that the threshold knows nothing of
        alone = matched.at(calibration.threshold).mean()
        mean = mean.widened((alone.high - alone.low) / 2)
    return {"calibrated_threshold": calibration.threshold, **interval_columns("mean_stability_calibrated", mean.within(0, 1))}


def by_seeds(results: Results) -> pd.DataFrame:
    """What smaller studies would have found: shares of the bands against the number of seeds, and how far p is off.

    One row per number of seeds, averaged over `SUBSETS` random choices of them; intervals are averages too. `p_error` says how
    far a feature's p is off; NaN where fewer than `OUTSIDE` seeds are left to tell.
    """
    matched, generator = matching.stability(results), np.random.default_rng(0)
    rows = []
    whole = len(matched.alive)
    for seeds in (n for n in range(min(3, whole), whole + 1) if n <= EVERY or (n - 1) % 10 == 0 or n == whole):
        chosen = {tuple(sorted(generator.permutation(len(matched.alive))[:seeds].tolist())) for _ in range(SUBSETS)}
        subsets = []
        for positions in sorted(chosen):
            subset = matched.among(list(positions))
            row: dict[str, float] = {}
            for band, interval in subset.shares().items():
                row |= interval_columns(f"{band}_share", interval)
            for band, interval in subset.latent_shares().items():
                row |= interval_columns(f"latent_{band}_share", interval)
            subsets.append(row | {"p_error": error_of_p(matched, list(positions))})
        rows.append({"seeds": seeds, **pd.DataFrame(subsets).mean()})
    return pd.DataFrame(rows)


def error_of_p(matched: Stability, seeds: list[int]) -> float:
    """How far the p that some seeds give their features is off: root mean square over features.

    The truth is not known. The seeds outside give the same features a p of their own, whose binomial variance is taken off the mean
    square of the difference. NaN where fewer than `OUTSIDE` are outside.
    """
    outside = [seed for seed in range(len(matched.alive)) if seed not in seeds]
    if len(outside) < OUTSIDE:
        return float("nan")
    alive = matched.alive[seeds]
    other = matched.matched[seeds][:, outside].double().mean(1)[alive]
    squares = (matched.among(seeds).probability[alive] - other).square() - other * (1 - other) / (len(outside) - 1)
    return float(squares.mean().clamp(min=0).sqrt())


def at_equal_seeds(results: Results, threshold: float) -> pd.DataFrame:
    """Matches of each live feature, of the model and its nulls, in a study of as many seeds as the smallest ensemble has."""
    matched = {kind: matching.stability(results, kind).at(threshold) for kind in results.cell.kinds}
    seeds = list(range(min(len(each.alive) for each in matched.values())))
    parts = [(kind, each.among(seeds)) for kind, each in matched.items()]
    return pd.concat(
        [pd.DataFrame({"kind": kind, "matches": part.counts[part.alive].numpy(), "trials": part.trials}) for kind, part in parts],
        ignore_index=True,
    )


def counts(results: Results) -> pd.DataFrame:
    """How many features have so many matches, of the model and its nulls, at the cell's threshold and an equal number of seeds."""
    matches = at_equal_seeds(results, results.cell.threshold)
    return matches.groupby(["kind", "trials", "matches"], sort=False).size().rename("features").reset_index()


def cells(results: Results) -> pd.DataFrame:
    """One row: what was trained, how good it is, its stability and that of its null, with jackknife intervals over seeds."""
    cell, real, surrogate = results.cell, matching.stability(results), matching.stability(results, "surrogate")
    equal, measured = min(len(real.alive), len(surrogate.alive)), quality.fit(results)
    l0 = measured.l0.mean().item()
    row = {
        "label": cell.label,
        "model": cell.model,
        "hook_name": cell.hook_name,
        "variant": cell.variant,
        "d_sae": cell.d_sae,
        "k": cell.k,
        "tokens": cell.tokens * cell.passes,
        "l0": l0,
        "l0_on_target": quality.on_target(l0, cell.k),
        "coefficient": ensembles.ensemble(results).coefficient,
        "explained_variance": quality.mean_explained(measured),
        "seeds": len(real.alive),
        "diverged": len(cell.seed_list) - len(real.alive),
        "surrogate_seeds": len(surrogate.alive),
        "threshold": cell.threshold,
        **interval_columns("mean_stability", real.mean()),
        **interval_columns("surrogate_mean_stability", surrogate.mean()),
        **calibrated_columns(real, calibrate(real, surrogate, NULL_SHARE), "real"),
        **interval_columns("separation", real.separation()),
        **interval_columns("area", real.area()),
        "surrogate_area": surrogate.area().value,
        **interval_columns("ambiguous_share", real.ambiguous_share()),
        "mcc": mean_mcc(matching.stability(results, "real", "one-to-one")).value,
        "surrogate_mcc": mean_mcc(matching.stability(results, "surrogate", "one-to-one")).value,
        "alpha": real.latent().alpha,
        "beta": real.latent().beta,
    }
    for band, interval in real.shares().items():
        row |= interval_columns(f"{band}_share", interval)
    for band, interval in real.latent_shares().items():
        row |= interval_columns(f"latent_{band}_share", interval)
    for kind, matched in (("real", real), ("surrogate", surrogate)):
        for band, interval in matched.among(list(range(equal))).shares().items():
            row |= interval_columns(f"{kind}_{band}_share_at_{equal}_seeds", interval)
    return pd.DataFrame([row])


def growth(results: Results) -> pd.DataFrame:
    """Stability as training goes, of the first `GROWN` seeds: one row per snapshot. What is dead in the end is always left out."""

    def rows(kind: str) -> pd.DataFrame:
        end, cell = matching.stability(results, kind), results.cell
        end = end.among(list(range(min(GROWN, len(end.alive)))))
        decoders = {tokens: W_dec[:GROWN] for tokens, W_dec in ensembles.snapshots(results, kind).items()}
        matched = {tokens: compare(W_dec, end.threshold, end.alive) for tokens, W_dec in decoders.items()}
        matched[cell.tokens * cell.passes] = end
        return pd.DataFrame(
            [
                {
                    "tokens": tokens,
                    **interval_columns("mean_stability", each.mean()),
                    **{f"{band}_share": interval.value for band, interval in each.shares().items()},
                }
                for tokens, each in matched.items()
            ]
        )

    return each_kind(results.cell.kinds, rows)


def thresholds(results: Results) -> pd.DataFrame:
    """Mean stability against the threshold, for the ensemble, its nulls, and two reference lines.

    Those are random directions with the covariance of the activations, and SAEs as they are before training.
    """
    cell, held_out = results.cell, texts.activations(results, "evaluation")
    generator = torch.Generator().manual_seed(0)
    draw = gaussian(replace(held_out, mean=torch.zeros(held_out.d_in)))
    start = variant(cell.variant)(cell.k)
    begun = [start.initialise(held_out.d_in, cell.d_sae, generator).W_dec for _ in range(REFERENCE_SEEDS)]
    kinds = {kind: matching.stability(results, kind) for kind in cell.kinds}
    kinds["random directions"] = compare(torch.stack([draw(cell.d_sae, generator) for _ in range(REFERENCE_SEEDS)]))
    kinds["untrained SAE"] = compare(torch.stack(begun))
    return pd.DataFrame(
        [
            {"kind": kind, "threshold": threshold, **interval_columns("mean_stability", matched.at(float(threshold)).mean())}
            for kind, matched in kinds.items()
            for threshold in THRESHOLDS
        ]
    )


def judge(results: Results) -> list[dict]:
    kinds = results.cell.kinds
    matched = {str(kind): matching.stability(results, kind) for kind in kinds}
    return judge_c1(matched, {str(kind): quality.fit(results, kind).frequency.numpy() for kind in kinds})


def judge_c1(matched: dict[str, Stability], frequency: dict[str, np.ndarray]) -> list[dict]:
    """C1 on one cell. The mean over pairs does not depend on the number of seeds, so the means compare at unequal S.

    The surrogate has no features to find, so the rule asks for more than it has. Other nulls have some: what reappears in a model
    with shuffled weights is not noise, so it stands beside the verdict and not in the rule.
    """
    real, surrogate = matched["real"], matched["surrogate"]
    stated, beyond_noise, beyond_frequency = C1
    reliability, latent = real.reliability(), real.latent_shares()
    conditions = [
        Condition("reliability", reliability, RELIABLE, no_effect=0.0),
        Condition("latent share of stable features", latent["stable"], SMALLEST_BAND, no_effect=0.0),
        Condition("latent share of unstable features", latent["unstable"], SMALLEST_BAND, no_effect=0.0),
    ]
    apart = difference(real.mean(), surrogate.mean())
    there = calibrate(real, surrogate, NULL_SHARE).interval(
        lambda at, ours, theirs: mean_at(real, at, ours) - mean_at(surrogate, at, theirs)
    )
    ones = {kind: matched[kind].alive.numpy().astype(float) for kind in ("real", "surrogate")}
    equal = at_equal_frequency(surrogate, ones["surrogate"], frequency["surrogate"], ones["real"], frequency["real"])
    nulls = {
        "seeds": len(real.alive),
        "null_seeds": len(surrogate.alive),
        "nulls": [
            {
                "null": kind,
                "seeds": len(null.alive),
                **named_interval("mean_stability", null.mean()),
                **named_interval("above", difference(real.mean(), null.mean())),
            }
            for kind, null in matched.items()
            if kind != "real"
        ],
    }
    noise = [Condition("at the threshold", apart, 0.0), Condition("at the calibrated threshold", there, 0.0)]
    less = difference(real.mean(), equal)
    return [
        judged(stated, reliability, surrogate.reliability(), conditions) | nulls,
        judged(beyond_noise, apart, NOWHERE, noise),
        judged(beyond_frequency, less, NOWHERE, [Condition("mean stability, less the surrogate's at equal frequency", less, 0.0)]),
    ]


def across(tables: Tables) -> Tables:
    """Add the mean stability of its live features to each SAE's row."""
    features = tables["features"]
    live = features[(features["kind"] == "real") & features["alive"]]
    mean = live.groupby(["cell", "seed"])["stability"].mean().rename("mean_stability").reset_index()
    return tables | {"saes": tables["saes"].merge(mean, on=["cell", "seed"], how="left")}


EXPERIMENT = Experiment(
    "stability",
    None,
    report_after=("matching", "families", "quality"),
    report_reads=("threshold", "evaluation_tokens"),
    tables={
        "cells": cells,
        "features": features,
        "counts": counts,
        "criteria": criteria,
        "seeds": by_seeds,
        "growth": growth,
        "thresholds": thresholds,
    },
    claims=judge,
    across=across,
)
