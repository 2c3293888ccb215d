"""Pools beside what else the same work buys."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import MARKERS, legend_below, new_axes, series_style


@recorded
def frontier(products: pd.DataFrame, title: str) -> Figure:
    """How much comes back in the same product of other seeds, against explained variance: a mark a product.

    Columns: name, share, explained, and the ends of their intervals.
    """
    figure, (axis,) = new_axes(title, height=4.4 + 0.25 * len(products))
    for position, (_, row) in enumerate(products.iterrows()):
        reach = [np.nan_to_num([[row[of] - row[f"{of}_low"]], [row[f"{of}_high"] - row[of]]]) for of in ("share", "explained")]
        colour, _ = series_style(position)
        filled = position < len(MARKERS) - 2
        axis.errorbar(
            row["share"],
            row["explained"],
            xerr=reach[0],
            yerr=reach[1],
            color=colour,
            marker=MARKERS[position % len(MARKERS)],
            markerfacecolor=colour if filled else "white",
            markersize=8,
            linestyle="none",
            capsize=2,
            label=row["name"],
        )
    axis.set(xlabel="share of features that come back\nin the same product of other seeds", ylabel="explained variance")
    legend_below(figure, axis)
    return figure
