"""How stability and what comes back move with the length of training and with the width of the dictionary."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, KINDS, in_thousands, legend_below, new_axes

SERIES = {
    "mean_stability": (KINDS["real"].colour, "o", "-", "come back in another seed"),
    "surrogate_mean_stability": (KINDS["surrogate"].colour, "s", KINDS["surrogate"].line, "the same in the surrogate"),
    "latent_unstable_share": (BAND_STYLES["unstable"].colour, BAND_STYLES["unstable"].marker, "--", "unstable, by the fit"),
}
"""Columns of the table `cells` that are drawn."""


@recorded
def against_tokens(cells: pd.DataFrame, title: str) -> Figure:
    """Shares of features against training tokens, each a training of its own. Columns: tokens, and those of `SERIES`."""
    figure, (axis,) = new_axes(title, height=4.2)
    _draw(axis, cells, "tokens")
    axis.set(xlabel="training tokens", ylabel="share of live features")
    axis.xaxis.set_major_formatter(in_thousands)
    legend_below(figure, axis)
    return figure


@recorded
def against_width(cells: pd.DataFrame, title: str) -> Figure:
    """The same against the number of features: with k fixed, and with k in proportion. Columns: d_sae, k, and those of `SERIES`."""
    figure, axes = new_axes(title, height=4.2, columns=2, sharey=True)
    for axis, (name, chosen) in zip(axes, by_sparsity(cells).items(), strict=True):
        _draw(axis, chosen, "d_sae")
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("features")
    axes[0].set_ylabel("share of live features")
    legend_below(figure, axes[0])
    return figure


def by_sparsity(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells with the first one's k, and those whose k is in proportion to their features, narrow ones first; by what they have
    in common."""
    main, cells = cells.iloc[0], cells.sort_values("d_sae")
    proportional = cells["k"] * main["d_sae"] == cells["d_sae"] * main["k"]
    return {f"k = {main['k']}": cells[cells["k"] == main["k"]], f"k = features / {main['d_sae'] // main['k']}": cells[proportional]}


def _draw(axis, cells: pd.DataFrame, x: str) -> None:
    cells = cells.sort_values(x)
    for column, (colour, marker, line, label) in SERIES.items():
        reach = np.abs(cells[[f"{column}_low", f"{column}_high"]].to_numpy().T - cells[column].to_numpy())
        options = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 2, "label": label}
        axis.errorbar(cells[x], cells[column], yerr=reach, **options)
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xticks(cells[x], [f"{value:,}" for value in cells[x]], rotation=45)
    axis.xaxis.set_minor_locator(NullLocator())
