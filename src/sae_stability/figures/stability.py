"""What reappears: by seeds, thresholds, criteria, cells, families."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import (
    BAND_STYLES,
    KINDS,
    count_ticks,
    legend_below,
    line_with_interval,
    new_axes,
    new_panels,
    shares_of_matches,
)
from sae_stability.matching import BANDS
from sae_stability.statistics import LatentShares


@recorded
def stability_histogram(features: pd.DataFrame, latent: LatentShares, title: str) -> Figure:
    """In how many other seeds features reappear, with the beta-binomial fit. Columns: matches, trials, band."""
    figure, (axis,) = new_axes(title)
    trials = int(features["trials"].iloc[0])
    share = shares_of_matches(features)
    bands = features.groupby("matches")["band"].first()
    colours = [BAND_STYLES[bands.get(count, "intermediate")].colour for count in share.index]
    axis.bar(share.index, share, color=colours, width=0.85)
    axis.plot(share.index, 100 * latent.expected_counts(trials), "ko-", markersize=4, linewidth=1, label="beta-binomial fit")
    for band in reversed(BANDS):
        axis.bar(0, 0, color=BAND_STYLES[band].colour, label=f"{band}: {(features['band'] == band).mean():.0%}")
    axis.legend(frameon=False)
    axis.set(xlabel=f"other seeds in which the feature reappears (of {trials})", ylabel="% of live features")
    axis.set_xticks(range(trials + 1))
    return figure


@recorded
def typical_features(closest: pd.DataFrame, threshold: float, title: str) -> Figure:
    """One panel a feature: its direction, and the closest one in each other seed at the angle that lies between them.

    Which side of it they are drawn on means nothing. Columns: band, cosine.
    """
    bands = list(dict.fromkeys(closest["band"]))
    figure, axes = new_axes(title, height=3.5, columns=len(bands))
    reach = np.arccos(threshold)
    edge = np.linspace(-reach, reach, 50)
    for axis, band in zip(axes, bands, strict=True):
        cosines, colour = np.sort(closest.loc[closest["band"] == band, "cosine"])[::-1], BAND_STYLES[band].colour
        back = int((cosines >= threshold).sum())
        axis.fill(np.append(np.cos(edge), 0), np.append(np.sin(edge), 0), color="#E5E5E5", linewidth=0)
        for place, angle in enumerate(np.arccos(np.clip(cosines, -1, 1))):
            side = 1 if place % 2 else -1
            _arrow(axis, (np.cos(angle), side * np.sin(angle)), colour, 1.4)
        _arrow(axis, (1, 0), "black", 2.4)
        axis.set_title(f"{band}: back in {back}\nof {len(cosines)} other seeds", fontsize="medium", color=colour)
        axis.set(xlim=(-0.15, 1.1), ylim=(-1.05, 1.05), aspect="equal")
        axis.axis("off")
    return figure


def _arrow(axis: Axes, tip: tuple[float, float], colour: str, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", tip, (0, 0), arrowprops=style)


@recorded
def against_nulls(features: pd.DataFrame, title: str) -> Figure:
    """The same histogram beside that of each null, at an equal number of seeds. Columns: kind, matches, trials."""
    kinds = list(dict.fromkeys(features["kind"]))
    names = [KINDS[kind].name for kind in kinds]
    figure, axes = new_panels(title, names, "other seeds\nwith a match", "% of live features")
    for axis, kind in zip(axes, kinds, strict=True):
        share, style = shares_of_matches(features[features["kind"] == kind]), KINDS[kind]
        axis.bar(share.index, share, color=style.colour, hatch=style.hatch, edgecolor="white", width=0.85)
        count_ticks(axis, share.index[-1])
    return figure


@recorded
def cell_histograms(features: pd.DataFrame, title: str) -> Figure:
    """One panel a cell: the share of features by matches, in the model and its surrogate. Columns: name, kind, matches, trials."""
    names = list(dict.fromkeys(features["name"]))
    figure, axes = new_panels(title, names, "other seeds\nwith a match", "% of live features")
    for axis, name in zip(axes, names, strict=True):
        for kind, shift in (("real", -0.2), ("surrogate", 0.2)):
            share = shares_of_matches(features[(features["name"] == name) & (features["kind"] == kind)])
            colour, _, hatch, label = KINDS[kind]
            axis.bar(share.index + shift, share, width=0.4, color=colour, hatch=hatch, edgecolor="white", label=label)
        count_ticks(axis, share.index[-1])
    legend_below(figure, axes[0], columns=2)
    return figure


@recorded
def criteria(table: pd.DataFrame, title: str) -> Figure:
    """Mean stability by each criterion, at the study's threshold and at the criterion's own calibrated one.

    Columns: criterion, kind, mean_stability, mean_stability_calibrated, each with _low and _high.
    """
    figure, (axis,) = new_axes(title, height=4.4)
    names = list(dict.fromkeys(table["criterion"]))[::-1]
    series = (
        ("real", "mean_stability", "o", "model, at the study's threshold"),
        ("surrogate", "mean_stability", "s", "surrogate, at the study's threshold"),
        ("real", "mean_stability_calibrated", "D", "model, at the calibrated threshold"),
    )
    for place, (kind, column, marker, label) in enumerate(series):
        rows, colour = table[table["kind"] == kind].set_index("criterion").loc[names], KINDS[kind].colour
        reach = np.abs(rows[[f"{column}_low", f"{column}_high"]].to_numpy().T - rows[column].to_numpy())
        face = "white" if column.endswith("calibrated") else colour
        axis.errorbar(
            rows[column], np.arange(len(names)) + 0.18 * (1 - place), xerr=np.nan_to_num(reach), fmt=marker, color=colour,
            markerfacecolor=face, markersize=6, elinewidth=1, label=label,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="mean stability", xlim=(-0.02, 1.02))
    axis.grid(axis="y", color="#EEEEEE")
    legend_below(figure, axis)
    return figure


@recorded
def by_seeds(table: pd.DataFrame, title: str) -> Figure:
    """Shares of features in the outer bands against the number of seeds, as counted and as fitted.

    Columns: seeds, and stable_share, unstable_share, latent_stable_share, latent_unstable_share with _low and _high.
    """
    figure, axes = new_axes(title, columns=2, sharey=True)
    for axis, prefix in zip(axes, ("", "latent_"), strict=True):
        for band in ("stable", "unstable"):
            column, (colour, marker, line) = f"{prefix}{band}_share", BAND_STYLES[band]
            axis.plot(table["seeds"], table[column], linestyle=line, marker=marker, markersize=3, color=colour, label=band)
            low, high = table[f"{column}_low"], table[f"{column}_high"]
            axis.fill_between(table["seeds"], low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title("true shares, by the fit" if prefix else "bands, as counted", fontsize="medium")
        axis.set(xlabel="seeds", ylabel="share of live features", ylim=(0, None))
    axes[0].legend(frameon=False)
    return figure


@recorded
def unique_families(table: pd.DataFrame, title: str) -> Figure:
    """Families met by so many seeds. Columns: kind, seeds, families, features (live ones a seed, on average)."""
    figure, (axis,) = new_axes(title)
    for kind, rows in table.groupby("kind", sort=False):
        colour, line, _, name = KINDS[kind]
        axis.plot(rows["seeds"], rows["families"], linestyle=line, marker="o", markersize=4, color=colour, label=name)
    real = table[table["kind"] == "real"]
    axis.plot(real["seeds"], real["seeds"] * real["features"], ":", color="black", label="if no feature came back")
    axis.set(xlabel="seeds", ylabel="unique families", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return figure


@recorded
def family_sizes(families: pd.DataFrame, title: str) -> Figure:
    """What share of the features belongs to families of each size, in the model and its surrogate. Columns: kind, size."""
    figure, (axis,) = new_axes(title)
    sizes = np.arange(1, families["size"].max() + 1)
    for kind, shift in (("real", -0.2), ("surrogate", 0.2)):
        members = families.loc[families["kind"] == kind].groupby("size")["size"].sum().reindex(sizes, fill_value=0)
        colour, _, hatch, name = KINDS[kind]
        share = 100 * members / members.sum()
        axis.bar(sizes + shift, share, width=0.4, color=colour, hatch=hatch, edgecolor="white", label=name)
    axis.set(xlabel="seeds in which the family has a member", ylabel="% of live features", xticks=sizes)
    axis.legend(frameon=False)
    return figure


@recorded
def neighbours(features: pd.DataFrame, threshold: float, title: str) -> Figure:
    """Cosines of features with the nearest one elsewhere. Columns: mean_best_cosine, nearest_within."""
    figure, (axis,) = new_axes(title)
    bins, weights = np.linspace(0, 1, 51), np.full(len(features), 100 / len(features))
    colours = [BAND_STYLES[band].colour for band in ("stable", "unstable")]
    filled = {"color": colours[0], "histtype": "stepfilled", "alpha": 0.6, "label": "in another seed, mean over seeds"}
    outlined = {"color": colours[1], "histtype": "step", "linestyle": "--", "label": "in its own dictionary"}
    for column, style in (("mean_best_cosine", filled), ("nearest_within", outlined)):
        axis.hist(features[column], bins, weights=weights, linewidth=2, **style)
    _mark_threshold(axis, threshold, axis.get_ylim()[1])
    axis.set(xlabel="cosine with the nearest other feature", ylabel="% of live features", xlim=(0, 1))
    legend_below(figure, axis, columns=2)
    return figure


@recorded
def thresholds(table: pd.DataFrame, threshold: float, calibrated: float, title: str) -> Figure:
    """Mean stability against the cosine threshold. Columns: kind, threshold, mean_stability, _low, _high.

    The calibrated threshold is NaN where there is none.
    """
    figure, (axis,) = new_axes(title, height=4.4)
    for kind, rows in table.groupby("kind", sort=False):
        line_with_interval(axis, rows, "threshold", "mean_stability", kind)
    _mark_threshold(axis, threshold, 1.0)
    if abs(calibrated - threshold) > 0.005:
        axis.axvline(calibrated, color=KINDS["surrogate"].colour, linewidth=1, linestyle="-.", label="calibrated threshold")
    axis.set(xlabel="cosine from which two features are the same", ylabel="mean stability", ylim=(-0.02, 1.02))
    legend_below(figure, axis, columns=2)
    return figure


@recorded
def against_frequency(features: pd.DataFrame, title: str, bins: int = 10) -> Figure:
    """Mean stability in ten equal groups of firing frequency, one line a seed. Columns: seed, frequency, stability."""
    figure, (axis,) = new_axes(title)
    group, colour = pd.qcut(features["frequency"], bins, labels=False, duplicates="drop"), KINDS["real"].colour
    centre = features["frequency"].groupby(group).median()
    lines = features.groupby([group, "seed"])["stability"].mean().unstack()
    axis.plot(centre, lines, color=colour, alpha=0.25, linewidth=1)
    axis.plot(centre, lines.mean(axis=1), "o-", color=colour, label="mean over seeds")
    axis.set(xscale="log", xlabel="share of tokens on which the feature fires", ylabel="mean stability", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return figure


@recorded
def growth(table: pd.DataFrame, decay_from: float, title: str) -> Figure:
    """Mean stability against training tokens. Columns: kind, tokens, mean_stability, _low, _high."""
    figure, (axis,) = new_axes(title)
    if decay_from < table["tokens"].max():
        axis.axvspan(decay_from, table["tokens"].max(), color="#EEEEEE", label="the rate decays")
    for kind, rows in table.groupby("kind", sort=False):
        line_with_interval(axis, rows, "tokens", "mean_stability", kind, marker="o")
    axis.set(xscale="log", xlabel="training tokens", ylabel="mean stability", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return figure


def _mark_threshold(axis, threshold: float, top: float) -> None:
    """A vertical line at the study's threshold, with its value beside its upper end."""
    axis.axvline(threshold, color="black", linewidth=1)
    axis.annotate(f"{threshold:g}", (threshold, top), xytext=(3, 0), textcoords="offset points", va="top")
