"""Tables of what reappears and how good SAEs are: one row per feature, per SAE, per cell."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from sae_stability.evaluation import Fit, top_contexts
from sae_stability.language import models
from sae_stability.language.activations import gaussian
from sae_stability.matching import BANDS, Stability, band_of, stability
from sae_stability.results import (
    activations_of,
    contexts_of,
    criteria_of,
    ensemble_of,
    families_of,
    fit_of,
    frontier_of,
    growth_of,
    kinds_of,
    losses_of,
    matching_of,
    sources_of,
    stability_of,
    training_folder,
)
from sae_stability.saes import variant
from sae_stability.store import Store, read_json
from sae_stability.tables.columns import interval_columns

L0_TOLERANCE = 0.05
NULL_SHARE = 0.01  # the adjusted threshold is where this share of surrogate features match
REFERENCE_SEEDS = 3  # of random directions and untrained SAEs
SUBSETS = 8  # of seeds, that stand for smaller studies
THRESHOLDS = np.round(np.arange(0.3, 1.0, 0.02), 2)
EXAMPLE_QUANTILES = (0.25, 0.5, 0.75)  # of firing frequency in a band: which features the book shows
EXAMPLE_TOKENS = 200_000


def features(store: Store, cell: str, kind: str, threshold: float | None = None) -> pd.DataFrame:
    """One row per feature: how often it fires, and in how many of the other seeds it comes back.

    At the cell's threshold unless another is given.
    """
    found, seeds = stability_of(store, cell, kind), ensemble_of(store, cell, kind).seeds
    if threshold is not None:
        found = found.at(threshold)
    low, high = found.interval
    count, d_sae = found.alive.shape
    best = found.best_cosine.nanmean(1).numpy()
    columns = {
        "alive": found.alive.numpy(),
        "frequency": fit_of(store, cell, kind).frequency.numpy(),
        "matches": found.counts.numpy(),
        "stability": found.probability.numpy(),
        "stability_low": low,
        "stability_high": high,
        "band": np.array([*BANDS, "dead"])[found.band],
        "mean_best_cosine": best,
        "ambiguous": found.ambiguous.sum(1).numpy(),
        "nearest_within": matching_of(store, cell, kind)["nearest_within"].numpy(),
        "family": families_of(store, cell, kind).family,
    }
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
    table.insert(0, "cell", cell)
    table.insert(1, "kind", kind)
    table.insert(2, "seed", np.repeat(seeds, d_sae))
    table.insert(3, "feature", np.tile(np.arange(d_sae), count))
    table.insert(7, "trials", found.trials)
    return table


def families(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """One row per family: its size, and the smallest cosine between two of its members."""
    found = families_of(store, cell, kind)
    columns = {"family": np.arange(len(found.size)), "size": found.size, "smallest_cosine": found.smallest_cosine}
    return pd.DataFrame({"cell": cell, "kind": kind, **columns})


def unique(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """How many families so many seeds meet, on average over the choices of seeds."""
    met = families_of(store, cell, kind).unique()
    return pd.DataFrame({"cell": cell, "kind": kind, "seeds": np.arange(1, len(met) + 1), "families": met})


def criteria(store: Store, cell: str) -> pd.DataFrame:
    """One row per criterion and kind: what reappears by it, and how far it agrees with the default."""
    rows = []
    surrogate = criteria_of(store, cell, "surrogate")
    for kind in kinds_of(store.study.cells[cell]):
        default = stability_of(store, cell, kind)
        for criterion, found in criteria_of(store, cell, kind).items():
            shares, adjusted = found.shares(), adjusted_threshold(surrogate[criterion])
            one, other = (of.probability[of.alive].numpy() for of in (default, found))
            row = {"cell": cell, "kind": kind, "criterion": criterion, "threshold": found.threshold}
            row |= interval_columns("mean_stability", found.mean())
            row |= interval_columns("stable_share", shares["stable"]) | interval_columns("unstable_share", shares["unstable"])
            row |= {"adjusted_threshold": adjusted, **interval_columns("mean_stability_adjusted", found.at(adjusted).mean())}
            rows.append(row | {"same_band": float((band_of(one) == band_of(other)).mean())})
    return pd.DataFrame(rows)


def by_seeds(store: Store, cell: str) -> pd.DataFrame:
    """What smaller studies would have found: shares of the bands against the number of seeds.

    One row per number of seeds, averaged over `SUBSETS` random choices of them; intervals are averages too.
    """
    found, generator = stability_of(store, cell, "real"), np.random.default_rng(0)
    rows = []
    for seeds in range(min(3, len(found.alive)), len(found.alive) + 1):
        chosen = {tuple(sorted(generator.permutation(len(found.alive))[:seeds].tolist())) for _ in range(SUBSETS)}
        parts = []
        for kept in sorted(chosen):
            part = found.among(list(kept))
            shares = {f"{name}_share": interval for name, interval in part.shares().items()}
            shares |= {f"latent_{name}_share": interval for name, interval in part.latent_shares().items()}
            parts.append(
                {key: value for name, interval in shares.items() for key, value in interval_columns(name, interval).items()}
            )
        rows.append({"cell": cell, "seeds": seeds, **pd.DataFrame(parts).mean()})
    return pd.DataFrame(rows)


def at_equal_seeds(store: Store, cell: str, threshold: float) -> pd.DataFrame:
    """Matches of each live feature, real and surrogate, in a study of as many seeds as the smaller ensemble has."""
    found = {kind: stability_of(store, cell, kind).at(threshold) for kind in kinds_of(store.study.cells[cell])}
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
                **interval_columns("explained_variance", measured.explained_variance(position)),
                "l0": float(measured.l0[position]),
                "l0_on_target": on_target(float(measured.l0[position]), store.study.cells[cell].k),
                "dead": int((~found.alive[position]).sum()),
                "mean_stability": float(np.nanmean(found.probability[position])),
                **interval_columns("loss_recovered", loss.recovered(position)),
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
    measured = fit_of(store, cell, "real")
    l0 = measured.l0.mean().item()
    row = {
        "cell": cell,
        "label": described.label,
        "variant": described.variant,
        "k": described.k,
        "l0": l0,
        "l0_on_target": on_target(l0, described.k),
        "coefficient": ensemble_of(store, cell, "real").coefficient,
        "explained_variance": mean_explained(measured),
        "l0_at_equal_quality": l0_at_equal_quality(store, cell),
        "seeds": len(real.alive),
        "diverged": len(described.seed_list) - len(real.alive),
        "surrogate_seeds": len(surrogate.alive),
        "threshold": described.threshold,
        "adjusted_threshold": adjusted_threshold(surrogate),
        **interval_columns("mean_stability", real.mean()),
        **interval_columns("surrogate_mean_stability", surrogate.mean()),
        **interval_columns("mean_stability_adjusted", real.at(adjusted_threshold(surrogate)).mean()),
        **interval_columns("separation", real.separation()),
        **interval_columns("area", real.area()),
        "surrogate_area": surrogate.area().value,
        **interval_columns("ambiguous_share", real.ambiguous_share()),
        "mcc": mean_mcc(store, cell, "real"),
        "surrogate_mcc": mean_mcc(store, cell, "surrogate"),
        "alpha": real.latent().alpha,
        "beta": real.latent().beta,
    }
    for name, interval in real.shares().items():
        row |= interval_columns(f"{name}_share", interval)
    for name, interval in real.latent_shares().items():
        row |= interval_columns(f"latent_{name}_share", interval)
    for kind, found in (("real", real), ("surrogate", surrogate)):
        for name, interval in found.among(list(range(equal))).shares().items():
            row |= interval_columns(f"{kind}_{name}_share_at_{equal}_seeds", interval)
    return pd.DataFrame([row])


def mean_mcc(store: Store, cell: str, kind: str) -> float:
    """The mean cosine of one-to-one partners (Song et al., arXiv:2505.20254), over all pairs of seeds and their live features.

    Pairs of unequal numbers of live features leave some without a partner, which do not count.
    """
    paired = stability_of(store, cell, kind, "one-to-one")
    cosines = torch.where(paired.partner >= 0, paired.best_cosine, torch.nan)
    return float(cosines.nanmean(2).nanmean())


def on_target(l0: float, k: int) -> bool:
    """Whether an L0 on held-out tokens is the one that the cell was to be brought to, within `L0_TOLERANCE`."""
    return abs(l0 - k) <= L0_TOLERANCE * k


def mean_explained(measured: Fit) -> float:
    """Explained variance on held-out tokens, on average over seeds."""
    return float(1 - measured.residual.sum(1).mean() / measured.total.sum())


def l0_at_equal_quality(store: Store, cell: str) -> float:
    """The L0 at which the cell would explain as much variance as the study's main cell; NaN beyond what was trained.

    Read off between the ensemble and its sparser and denser pilots: log L0 against explained variance, piecewise linear.
    """
    wanted, own = (fit_of(store, name, "real") for name in ("main", cell))
    points = [(mean_explained(own), own.l0.mean().item())]
    points += [(pilot["explained_variance"], pilot["l0"]) for pilot in frontier_of(store, cell)]
    explained, l0 = np.array(sorted(points)).T
    return float(np.exp(np.interp(mean_explained(wanted), explained, np.log(l0), left=np.nan, right=np.nan)))


def curve(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """The training curve: one row per seed and point."""
    table = pd.DataFrame(read_json(training_folder(store, cell, kind) / "curve.json"))
    return table.assign(cell=cell, kind=kind)


def growth(store: Store, cell: str, kind: str) -> pd.DataFrame:
    """Stability as training goes: one row per snapshot."""
    rows = []
    for tokens, found in growth_of(store, cell, kind).items():
        shares = {f"{name}_share": interval.value for name, interval in found.shares().items()}
        rows.append({"cell": cell, "kind": kind, "tokens": tokens, **interval_columns("mean_stability", found.mean()), **shares})
    return pd.DataFrame(rows)


def thresholds(store: Store, cell: str) -> pd.DataFrame:
    """Mean stability against the threshold, for the ensemble, its nulls, and two reference lines.

    Those are random directions with the covariance of the activations, and SAEs as they are before training.
    """
    described = store.study.cells[cell]
    held_out = activations_of(store, sources_of(store.study)[cell], described, "evaluation")
    generator = torch.Generator().manual_seed(0)
    draw = gaussian(replace(held_out, mean=torch.zeros(held_out.d_in)))
    start = variant(described.variant)(described.k)
    begun = [start.initialise(held_out.d_in, described.d_sae, generator).W_dec for _ in range(REFERENCE_SEEDS)]
    kinds = {kind: stability_of(store, cell, kind) for kind in kinds_of(described)}
    kinds["random directions"] = stability(torch.stack([draw(described.d_sae, generator) for _ in range(REFERENCE_SEEDS)]))
    kinds["untrained SAE"] = stability(torch.stack(begun))
    rows = [
        {
            "cell": cell,
            "kind": kind,
            "threshold": threshold,
            **interval_columns("mean_stability", found.at(float(threshold)).mean()),
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
    first = features(store, "main", "real").query(f"seed == {ensemble_of(store, 'main', 'real').seeds[0]} and alive")
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
