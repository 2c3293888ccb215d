"""Tidy tables of a study: one row per feature, per SAE, per cell, and what the figures draw."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from sae_stability.config import Study
from sae_stability.evaluation import top_contexts
from sae_stability.language import models
from sae_stability.matching import BANDS, Stability, stability
from sae_stability.results import (
    KINDS,
    activations_of,
    contexts_of,
    ensemble_of,
    fit_of,
    growth_of,
    losses_of,
    sources_of,
    stability_of,
)
from sae_stability.statistics import Interval
from sae_stability.store import Store, read_json, write_table

NULL_SHARE = 0.01  # the adjusted threshold is where this share of surrogate features match
THRESHOLDS = np.round(np.arange(0.3, 1.0, 0.02), 2)
EXAMPLE_QUANTILES = (0.25, 0.5, 0.75)  # of firing frequency in a band: which features the book shows
EXAMPLE_TOKENS = 200_000


def write(study: Study, folder: Path) -> None:
    """Write every table of the study to `folder`."""
    store = Store(study)
    tables = {"features": [], "saes": [], "cells": [], "curve": [], "growth": [], "thresholds": []}
    for cell in study.cells:
        tables["features"] += [features(store, cell, kind) for kind in KINDS]
        tables["saes"].append(saes(store, cell))
        tables["cells"].append(cells(store, cell))
        tables["curve"] += [curve(store, cell, kind) for kind in KINDS]
        tables["growth"] += [growth(store, cell, kind) for kind in KINDS]
        tables["thresholds"].append(thresholds(store, cell))
    for name, parts in tables.items():
        write_table(folder / f"{name}.parquet", pd.concat(parts, ignore_index=True))
    write_table(folder / "examples.parquet", examples(store))


def features(store: Store, cell: str, kind: str, threshold: float | None = None) -> pd.DataFrame:
    """One row per feature: how often it fires, and in how many of the other seeds it comes back.

    At the cell's threshold unless another is given.
    """
    found, seeds = stability_of(store, cell, kind), ensemble_of(store, cell, kind).seeds
    if threshold is not None:
        found = found.at(threshold)
    low, high = found.interval
    count, d_sae = found.alive.shape
    best = np.nanmean(found.best_cosine.numpy(), axis=1)
    columns = {
        "alive": found.alive.numpy(),
        "frequency": fit_of(store, cell, kind).frequency.numpy(),
        "matches": found.counts.numpy(),
        "stability": found.probability.numpy(),
        "stability_low": low,
        "stability_high": high,
        "band": np.array([*BANDS, "dead"])[found.band],
        "mean_best_cosine": best,
    }
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
    table.insert(0, "cell", cell)
    table.insert(1, "kind", kind)
    table.insert(2, "seed", np.repeat(seeds, d_sae))
    table.insert(3, "feature", np.tile(np.arange(d_sae), count))
    table.insert(7, "trials", found.trials)
    return table


def at_equal_seeds(store: Store, cell: str, threshold: float) -> pd.DataFrame:
    """Matches of each live feature, real and surrogate, in a study of as many seeds as the smaller ensemble has."""
    found = {kind: stability_of(store, cell, kind).at(threshold) for kind in KINDS}
    seeds = list(range(min(len(stability.alive) for stability in found.values())))
    parts = [(kind, stability.among(seeds)) for kind, stability in found.items()]
    return pd.concat(
        [pd.DataFrame({"kind": kind, "matches": part.counts[part.alive].numpy(), "trials": part.trials}) for kind, part in parts],
        ignore_index=True,
    )


def saes(store: Store, cell: str) -> pd.DataFrame:
    """One row per SAE: its quality on held-out documents."""
    measured, loss, found = fit_of(store, cell, "real"), losses_of(store, cell), stability_of(store, cell, "real")
    clean, zero, mean = (loss.per_token(sums).value for sums in (loss.clean, loss.zero, loss.mean))
    rows = []
    for position, seed in enumerate(ensemble_of(store, cell, "real").seeds):
        rows.append(
            {
                "cell": cell,
                "seed": seed,
                **_interval("explained_variance", measured.explained_variance(position)),
                "l0": float(measured.l0[position]),
                "dead": int((~found.alive[position]).sum()),
                "mean_stability": float(np.nanmean(found.probability[position])),
                **_interval("loss_recovered", loss.recovered(position)),
                "loss_spliced": loss.per_token(loss.spliced[position]).value,
                "loss_clean": clean,
                "loss_mean_ablated": mean,
                "loss_zero_ablated": zero,
            }
        )
    return pd.DataFrame(rows)


def cells(store: Store, cell: str) -> pd.DataFrame:
    """One row per cell: stability and its null, with jackknife intervals over seeds."""
    described, real, surrogate = (
        store.study.cells[cell],
        stability_of(store, cell, "real"),
        stability_of(store, cell, "surrogate"),
    )
    equal = min(len(real.alive), len(surrogate.alive))
    row = {
        "cell": cell,
        "label": described.label,
        "seeds": len(real.alive),
        "surrogate_seeds": len(surrogate.alive),
        "threshold": described.threshold,
        "adjusted_threshold": adjusted_threshold(surrogate),
        **_interval("mean_stability", real.mean()),
        **_interval("surrogate_mean_stability", surrogate.mean()),
        **_interval("mean_stability_adjusted", real.at(adjusted_threshold(surrogate)).mean()),
        **_interval("separation", real.separation()),
        "alpha": real.latent().alpha,
        "beta": real.latent().beta,
    }
    for name, interval in real.shares().items():
        row |= _interval(f"{name}_share", interval)
    for name, interval in real.latent_shares().items():
        row |= _interval(f"latent_{name}_share", interval)
    for kind, found in (("real", real), ("surrogate", surrogate)):
        for name, interval in found.among(list(range(equal))).shares().items():
            row |= _interval(f"{kind}_{name}_share_at_{equal}_seeds", interval)
    return pd.DataFrame([row])


def curve(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """The training curve: one row per seed and point."""
    table = pd.DataFrame(read_json(store.folder / "cells" / cell / kind / "curve.json"))
    return table.assign(cell=cell, kind=kind)


def growth(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """Stability as training goes: one row per snapshot."""
    rows = []
    for tokens, found in growth_of(store, cell, kind).items():
        shares = {f"{name}_share": interval.value for name, interval in found.shares().items()}
        rows.append({"cell": cell, "kind": kind, "tokens": tokens, **_interval("mean_stability", found.mean()), **shares})
    return pd.DataFrame(rows)


def thresholds(store: Store, cell: str) -> pd.DataFrame:
    """Mean stability against the threshold, for the ensemble, its surrogate and random directions."""
    real = stability_of(store, cell, "real")
    d_sae, d_in = ensemble_of(store, cell, "real").W_dec.shape[1:]
    directions = F.normalize(torch.randn(3, d_sae, d_in, generator=torch.Generator().manual_seed(0)), dim=2)
    kinds = {
        "real": real,
        "surrogate": stability_of(store, cell, "surrogate"),
        "random directions": stability(directions),
    }
    rows = [
        {
            "cell": cell,
            "kind": kind,
            "threshold": threshold,
            **_interval("mean_stability", found.at(float(threshold)).mean()),
        }
        for kind, found in kinds.items()
        for threshold in THRESHOLDS
    ]
    return pd.DataFrame(rows)


def adjusted_threshold(surrogate: Stability) -> float:
    """The threshold that `NULL_SHARE` of (surrogate feature, other seed) pairs reach: what chance and covariance give."""
    pairs = surrogate.alive[:, None] & ~torch.eye(len(surrogate.alive), dtype=torch.bool)[:, :, None]
    return float(np.quantile(surrogate.best_cosine[pairs].numpy(), 1 - NULL_SHARE))


def examples(store: Store) -> pd.DataFrame:
    """Features of the main cell's first seed, chosen by rule from each band, in the contexts where they fire most.

    A chosen feature that does not fire in the first `EXAMPLE_TOKENS` held-out tokens has no rows.
    """
    source, cell = sources_of(store.study)["main"], store.study.cells["main"]
    first = features(store, "main", "real").query("seed == @cell.seed_list[0] and alive")
    chosen = {}
    for band in BANDS:
        ranked = first[first["band"] == band].sort_values(["frequency", "feature"])["feature"].tolist()
        places = {round(quantile * (len(ranked) - 1)) for quantile in EXAMPLE_QUANTILES} if ranked else set()
        chosen |= {ranked[place]: band for place in sorted(places)}
    held_out = activations_of(store, source, cell, "evaluation")
    window = held_out.first(EXAMPLE_TOKENS)
    tokenizer = models.load_tokenizer(source.model)
    contexts = contexts_of(store, source, "evaluation")
    table = top_contexts(ensemble_of(store, "main", "real"), 0, list(chosen), window, contexts, tokenizer)
    table.insert(0, "band", table["feature"].map(chosen))
    return table.merge(first[["feature", "stability", "matches", "trials", "frequency"]], on="feature")


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
