"""Subspaces of unstable features, and means of their copies."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_stability.figures.style import BAND_STYLES, MARKERS, legend_below, new_axes, series_style


def shared_subspaces(curves: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """How much of what its own subspace holds lies in that of another seed's set, against the rank: a line a set, by its name.

    Columns: rank, value, value_low, value_high.
    """
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
