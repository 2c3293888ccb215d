"""Subspaces of unstable features, and means of their copies."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, MARKERS, SERIES_LINES, legend_below, line_with_interval, new_axes, series_style
from sae_stability.matching.theory import LATENTS_OVER_R, expected_stability


@recorded
def shared_subspaces(curves: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """How much of what its own subspace holds lies in that of another seed's set, against the rank: a line a set, by its name.

    Columns: rank, value, value_low, value_high. A set of which no value is known has no line.
    """
    curves = {name: curve for name, curve in curves.items() if curve["value"].notna().any()}
    figure, (axis,) = new_axes(title, height=4.6)
    for position, (name, curve) in enumerate(curves.items()):
        colour, line = series_style(position)
        curve = curve.sort_values("rank")
        reach = np.abs(curve[["value_low", "value_high"]].sub(curve["value"], axis=0).fillna(0)).to_numpy().T
        shifted = curve["rank"] * (1 + 0.02 * (position - len(curves) / 2))
        axis.errorbar(shifted, curve["value"], reach, color=colour, linestyle=line, marker=MARKERS[position], label=name, capsize=2)
    ranks = sorted({int(rank) for curve in curves.values() for rank in curve["rank"]})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.set(xlabel="rank r of the subspace", ylabel="in another seed's subspace,\nover that in their own", ylim=(0, 1))
    legend_below(figure, axis, columns=1)
    return figure


@recorded
def four_ways(shares: pd.DataFrame, title: str) -> Figure:
    """Unstable features and their stable matches, each looked for in either of another seed.

    Columns: of, by (`paired` or `matched`), value, value_low, value_high.
    """
    figure, (axis,) = new_axes(title, height=3.2)
    names = {"paired": "unstable", "matched": "matched stable"}
    rows = shares.iloc[::-1].reset_index(drop=True)
    for place, row in rows.iterrows():
        style = BAND_STYLES["unstable" if row["of"] == "paired" else "stable"]
        reach = np.nan_to_num([[row["value"] - row["value_low"]], [row["value_high"] - row["value"]]])
        axis.errorbar(row["value"], place, xerr=reach, marker=style.marker, color=style.colour, capsize=3, markersize=8)
    axis.set_yticks(range(len(rows)), [f"{names[row['of']]}\nin {names[row['by']]}" for _, row in rows.iterrows()])
    axis.set(xlabel="share of the energy inside", xlim=(0, None), ylim=(-0.6, len(rows) - 0.4))
    return figure


@recorded
def group_means(table: pd.DataFrame, title: str) -> Figure:
    """Cosines of means of features and their partners, against how many are averaged; dotted, what noisy copies would have.

    Columns: band, size, cosine, cosine_low, cosine_high, predicted.
    """
    figure, (axis,) = new_axes(title, height=4.2)
    for band, style in BAND_STYLES.items():
        rows = table[table["band"] == band].sort_values("size")
        if rows["cosine"].isna().all():
            continue
        reach = np.abs(rows[["cosine_low", "cosine_high"]].sub(rows["cosine"], axis=0).fillna(0)).to_numpy().T
        axis.errorbar(
            rows["size"],
            rows["cosine"],
            reach,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            label=band,
            capsize=3,
        )
        axis.plot(rows["size"], rows["predicted"], color=style.colour, linestyle=":", linewidth=1.2)
    axis.plot([], [], color="black", linestyle=":", linewidth=1.2, label="noisy copies of one direction (Spearman-Brown)")
    axis.set_xticks(sorted(set(table["size"])))
    axis.set(xlabel="features averaged, each of another seed", ylabel="cosine of two such means", ylim=(0, 1.02))
    legend_below(figure, axis, columns=1)
    return figure


@recorded
def reappearance(curves: pd.DataFrame, ranks: Sequence[int], title: str) -> Figure:
    """How often unstable features come back at a cosine or above; grey, what turned axes of blocks of some ranks would.

    Columns: kind, cosine, p, p_low, p_high.
    """
    figure, (axis,) = new_axes(title, height=4.8)
    for kind, curve in curves.groupby("kind", sort=False):
        line_with_interval(axis, curve, "cosine", "p", str(kind))
    cosines = np.linspace(0.2, 0.99, 80)
    for position, r in enumerate(ranks):
        expected = [expected_stability(r, LATENTS_OVER_R * r, cosine) for cosine in cosines]
        axis.plot(cosines, expected, color="#8C8C8C", linewidth=1, linestyle=SERIES_LINES[position], label=f"turned axes, r = {r}")
    axis.set(xlabel="cosine that counts as coming back", ylabel="share of unstable features", xlim=(0.2, 1), ylim=(0, 1.02))
    legend_below(figure, axis, columns=2)
    return figure


@recorded
def planar_group(group: pd.DataFrame, title: str) -> Figure:
    """Directions of the features of a group in its first two dimensions, an arrow each, as they are and turned onto one seed.

    The circle is unit length. Columns: seed, x, y, turned_x, turned_y; where a feature is not turned it stands as it is, in grey.
    Where none is, they stand as they are only.
    """
    panels = {"as they are": ("x", "y"), "turned onto the grey": ("turned_x", "turned_y")}
    if group["turned_x"].isna().all():
        del panels["turned onto the grey"]
    figure, axes = new_axes(title, height=4.2, columns=len(panels), sharey=True)
    angles = np.linspace(0, 2 * np.pi, 200)
    for axis, (name, columns) in zip(axes, panels.items(), strict=True):
        axis.plot(np.cos(angles), np.sin(angles), color="#8C8C8C", linewidth=0.8)
        for position, (seed, arrows) in enumerate(group.groupby("seed")):
            colour, line = series_style(position)
            still = arrows[list(columns)].isna().all(axis=None)
            for number, (x, y) in enumerate(arrows[["x", "y"] if still else list(columns)].to_numpy()):
                shown = "#8C8C8C" if still else colour
                axis.plot([0, x], [0, y], color=shown, linestyle=line, linewidth=2, label=None if number else f"seed {seed}")
                axis.plot(x, y, color=shown, marker=MARKERS[position], markersize=7)
        axis.set_title(name, fontsize="medium")
        axis.set(xlabel="first dimension", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
    axes[0].set_ylabel("second dimension of the group")
    legend_below(figure, axes[0], columns=3)
    return figure
