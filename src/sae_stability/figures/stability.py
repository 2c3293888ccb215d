"""What reappears: by seeds, thresholds, criteria, variants, families."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.style import COLOURS, DASHES, HATCHES, NAMES, new_axes
from sae_stability.statistics import LatentShares


def stability_histogram(features: pd.DataFrame, latent: LatentShares, title: str) -> Figure:
    """In how many other seeds features reappear, with the beta-binomial fit. Columns: matches, trials, band."""
    figure, (axis,) = new_axes(title)
    trials = int(features["trials"].iloc[0])
    share = features["matches"].value_counts(normalize=True).reindex(range(trials + 1), fill_value=0) * 100
    bands = features.groupby("matches")["band"].first()
    axis.bar(share.index, share, color=[COLOURS[bands.get(count, "intermediate")] for count in share.index], width=0.85)
    axis.plot(share.index, 100 * latent.expected_counts(trials), "ko-", markersize=4, linewidth=1, label="beta-binomial fit")
    for band in ("unstable", "intermediate", "stable"):
        axis.bar(0, 0, color=COLOURS[band], label=f"{band}: {(features['band'] == band).mean():.0%}")
    axis.legend(frameon=False)
    axis.set(xlabel=f"other seeds in which the feature reappears (of {trials})", ylabel="% of live features")
    axis.set_xticks(range(trials + 1))
    return figure


def against_nulls(features: pd.DataFrame, title: str) -> Figure:
    """The same histogram beside that of each null, at an equal number of seeds. Columns: kind, matches, trials."""
    kinds = [kind for kind in HATCHES if kind in set(features["kind"])]
    figure, axes = new_axes(title, columns=len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        part = features[features["kind"] == kind]
        trials = int(part["trials"].iloc[0])
        share = part["matches"].value_counts(normalize=True).reindex(range(trials + 1), fill_value=0) * 100
        axis.bar(share.index, share, color=COLOURS[kind], hatch=HATCHES[kind], edgecolor="white", width=0.85)
        axis.set_title(NAMES[kind], fontsize="medium")
        axis.set_xlabel("other seeds\nwith a match")
        axis.set_xticks(range(trials + 1))
    axes[0].set_ylabel("% of live features")
    return figure


def variant_histograms(features: pd.DataFrame, title: str) -> Figure:
    """One panel a variant: the share of features by matches, in the model and its null. Columns: variant, kind, matches, trials."""
    names = list(dict.fromkeys(features["variant"]))
    rows = -(-len(names) // 3)
    figure, axes = new_axes(title, height=2.1 * rows + 0.9, columns=min(3, len(names)), rows=rows, sharey=True)
    for axis, name in zip(axes, names, strict=False):
        of = features[features["variant"] == name]
        places = range(int(of["trials"].iloc[0]) + 1)
        for kind in ("real", "surrogate"):
            share = of.loc[of["kind"] == kind, "matches"].value_counts(normalize=True).reindex(places, fill_value=0) * 100
            shift = -0.2 if kind == "real" else 0.2
            axis.bar(
                share.index + shift,
                share,
                width=0.4,
                color=COLOURS[kind],
                hatch=HATCHES[kind],
                edgecolor="white",
                label=NAMES[kind],
            )
        axis.set_title(name, fontsize="medium")
        axis.set_xticks(places)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) - 3) : len(names)]:
        axis.set_xlabel("other seeds\nwith a match")
    for axis in axes[::3]:
        axis.set_ylabel("% of live features")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return figure


def criteria(table: pd.DataFrame, title: str) -> Figure:
    """Mean stability by each criterion, at the study's threshold and at the criterion's own adjusted one.

    Columns: criterion, kind, mean_stability, mean_stability_adjusted, each with _low and _high.
    """
    figure, (axis,) = new_axes(title, height=4.4)
    names = list(dict.fromkeys(table["criterion"]))[::-1]
    shown = (
        ("real", "mean_stability", "o", "model, at the study's threshold"),
        ("surrogate", "mean_stability", "s", "surrogate, at the study's threshold"),
        ("real", "mean_stability_adjusted", "D", "model, at the adjusted threshold"),
    )
    for place, (kind, column, marker, label) in enumerate(shown):
        of = table[table["kind"] == kind].set_index("criterion").loc[names]
        reach = np.abs(of[[f"{column}_low", f"{column}_high"]].to_numpy().T - of[column].to_numpy())
        face = "white" if column.endswith("adjusted") else COLOURS[kind]
        axis.errorbar(
            of[column], np.arange(len(names)) + 0.18 * (1 - place), xerr=np.nan_to_num(reach), fmt=marker, color=COLOURS[kind],
            markerfacecolor=face, markersize=6, elinewidth=1, label=label,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="mean stability", xlim=(-0.02, 1.02))
    axis.grid(axis="y", color="#EEEEEE")
    figure.legend(frameon=False, loc="outside lower center", fontsize="small")
    return figure


def by_seeds(table: pd.DataFrame, title: str) -> Figure:
    """Shares of features in the outer bands against the number of seeds, as counted and as fitted.

    Columns: seeds, and stable_share, unstable_share, latent_stable_share, latent_unstable_share with _low and _high.
    """
    figure, axes = new_axes(title, columns=2, sharey=True)
    for axis, fitted in zip(axes, ("", "latent_"), strict=True):
        for band, dashes, marker in (("stable", "-", "o"), ("unstable", "--", "s")):
            column = f"{fitted}{band}_share"
            axis.plot(table["seeds"], table[column], dashes, marker=marker, markersize=3, color=COLOURS[band], label=band)
            low, high = table[f"{column}_low"], table[f"{column}_high"]
            axis.fill_between(table["seeds"], low, high, color=COLOURS[band], alpha=0.2, linewidth=0)
        axis.set_title("true shares, by the fit" if fitted else "bands, as counted", fontsize="medium")
        axis.set(xlabel="seeds", ylabel="share of live features", ylim=(0, None))
    axes[0].legend(frameon=False)
    return figure


def unique_families(table: pd.DataFrame, title: str) -> Figure:
    """Families met by so many seeds. Columns: kind, seeds, families, features (live ones a seed, on average)."""
    figure, (axis,) = new_axes(title)
    for kind, part in table.groupby("kind", sort=False):
        axis.plot(part["seeds"], part["families"], "o" + DASHES[kind], markersize=4, color=COLOURS[kind], label=NAMES[kind])
    ours = table[table["kind"] == "real"]
    nothing = ours["seeds"] * ours["features"]
    axis.plot(ours["seeds"], nothing, ":", color="black", label="if no feature came back")
    axis.set(xlabel="seeds", ylabel="unique families", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return figure


def family_sizes(families: pd.DataFrame, title: str) -> Figure:
    """The share of features in families of each size. Columns: kind, size."""
    figure, (axis,) = new_axes(title)
    sizes = np.arange(1, families["size"].max() + 1)
    for kind, shift in (("real", -0.2), ("surrogate", 0.2)):
        members = families.loc[families["kind"] == kind].groupby("size")["size"].sum().reindex(sizes, fill_value=0)
        share = 100 * members / members.sum()
        axis.bar(sizes + shift, share, width=0.4, color=COLOURS[kind], hatch=HATCHES[kind], edgecolor="white", label=NAMES[kind])
    axis.set(xlabel="seeds in which the family has a member", ylabel="% of live features", xticks=sizes)
    axis.legend(frameon=False)
    return figure


def neighbours(features: pd.DataFrame, threshold: float, title: str) -> Figure:
    """Cosines of features with the nearest one elsewhere. Columns: mean_best_cosine, nearest_within."""
    figure, (axis,) = new_axes(title)
    bins = np.linspace(0, 1, 51)
    columns = (
        ("mean_best_cosine", "stable", "in another seed, mean over seeds"),
        ("nearest_within", "unstable", "in its own dictionary"),
    )
    for column, colour, label in columns:
        filled = column == "mean_best_cosine"
        axis.hist(
            features[column], bins, weights=np.full(len(features), 100 / len(features)), label=label, color=COLOURS[colour],
            histtype="stepfilled" if filled else "step", alpha=0.6 if filled else 1, linewidth=2, linestyle="-" if filled else "--",
        )  # fmt: skip
    axis.axvline(threshold, color="black", linewidth=1)
    axis.annotate(f"{threshold:g}", (threshold, axis.get_ylim()[1]), xytext=(3, 0), textcoords="offset points", va="top")
    axis.set(xlabel="cosine with the nearest other feature", ylabel="% of live features", xlim=(0, 1))
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def thresholds(table: pd.DataFrame, threshold: float, adjusted: float, title: str) -> Figure:
    """Mean stability against the cosine threshold. Columns: kind, threshold, mean_stability, _low, _high."""
    figure, (axis,) = new_axes(title, height=4.4)
    for kind, part in table.groupby("kind", sort=False):
        axis.plot(part["threshold"], part["mean_stability"], linestyle=DASHES[kind], color=COLOURS[kind], label=NAMES[kind])
        axis.fill_between(
            part["threshold"],
            part["mean_stability_low"],
            part["mean_stability_high"],
            color=COLOURS[kind],
            alpha=0.2,
            linewidth=0,
        )
    axis.axvline(threshold, color="black", linewidth=1)
    axis.annotate(f"{threshold:g}", (threshold, 1.0), xytext=(3, 0), textcoords="offset points", va="top")
    if abs(adjusted - threshold) > 0.005:
        axis.axvline(adjusted, color=COLOURS["surrogate"], linewidth=1, linestyle="-.", label="1 % of surrogate pairs")
    axis.set(xlabel="cosine from which two features are the same", ylabel="mean stability", ylim=(-0.02, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", fontsize="small", ncols=2)
    return figure


def against_frequency(features: pd.DataFrame, title: str, bins: int = 10) -> Figure:
    """Mean stability in ten equal groups of firing frequency, one line a seed. Columns: seed, frequency, stability."""
    figure, (axis,) = new_axes(title)
    group = pd.qcut(features["frequency"], bins, labels=False, duplicates="drop")
    centre = features["frequency"].groupby(group).median()
    lines = features.groupby([group, "seed"])["stability"].mean().unstack()
    axis.plot(centre, lines, color=COLOURS["real"], alpha=0.25, linewidth=1)
    axis.plot(centre, lines.mean(axis=1), "o-", color=COLOURS["real"], label="mean over seeds")
    axis.set(xscale="log", xlabel="share of tokens on which the feature fires", ylabel="mean stability", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return figure


def growth(table: pd.DataFrame, decay_from: float, title: str) -> Figure:
    """Mean stability against training tokens. Columns: kind, tokens, mean_stability, _low, _high."""
    figure, (axis,) = new_axes(title)
    axis.axvspan(decay_from, table["tokens"].max(), color="#EEEEEE", label="the rate decays")
    for kind, part in table.groupby("kind", sort=False):
        low, high = (part[f"mean_stability_{end}"] for end in ("low", "high"))
        axis.plot(part["tokens"], part["mean_stability"], "o" + DASHES[kind], color=COLOURS[kind], label=NAMES[kind])
        axis.fill_between(part["tokens"], low, high, color=COLOURS[kind], alpha=0.2, linewidth=0)
    axis.set(xscale="log", xlabel="training tokens", ylabel="mean stability", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return figure
