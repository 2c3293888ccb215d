"""What all figures share: size, panels, and how bands, kinds and cells are drawn everywhere.

Colours are those of Okabe & Ito, which colour-blind readers tell apart, and one of Tol's. What a colour says, a line style, a
marker or a hatch says too.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_stability.matching import BANDS

Line = str | tuple[float, tuple[float, ...]]
"""A line style: a name, or a tuple of an offset and the lengths of dashes and gaps."""

SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00")
SERIES_LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
"""Of series, in the order of their colours."""
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#CC79A7", "#882255", "#999999", "#DDDDDD")
WIDTH = 5.6  # inches: text stays readable when a phone shrinks the figure


class Band(NamedTuple):
    """How features of a band are drawn."""

    colour: str
    marker: str
    line: Line


class Kind(NamedTuple):
    """How an ensemble, a null or a reference is drawn, and what readers call it."""

    colour: str
    line: Line
    hatch: str
    name: str


class Kinds(dict[str, Kind]):
    """Kinds by what tables call them. One that has no line below takes the next style of a cycle, and goes by its own name."""

    def __missing__(self, kind: str) -> Kind:
        colour, line = series_style(len(self))
        self[kind] = Kind(colour, line, "xx", kind)
        return self[kind]


BAND_STYLES = {
    "stable": Band("#0072B2", "o", "-"),
    "intermediate": Band("#8C8C8C", "s", ":"),
    "unstable": Band("#D55E00", "^", "--"),
}
KINDS = Kinds(
    {
        "real": Kind("#0072B2", "-", "", "language model"),
        "surrogate": Kind("#CC79A7", "--", "//", "Gaussian surrogate"),
        "randomised": Kind("#009E73", "-.", "..", "shuffled weights"),
        "whitened": Kind("#56B4E9", (0, (6, 2, 1, 2, 1, 2)), "\\\\", "whitened activations"),
        "token-conditional": Kind("#882255", (0, (8, 3)), "++", "Gaussian around each token"),
        "random directions": Kind("#000000", ":", "oo", "random, same covariance"),
        "untrained SAE": Kind("#E69F00", (0, (1, 3)), "--", "untrained SAEs"),
    }
)


def series_style(position: int) -> tuple[str, Line]:
    """Colour and line of one of many series. Twelve are told apart; then the same ones come again."""
    lap = position // len(SERIES_COLOURS)
    return SERIES_COLOURS[position % len(SERIES_COLOURS)], SERIES_LINES[(position % 2 + 2 * lap) % len(SERIES_LINES)]


def new_axes(title: str, height: float = 3.6, columns: int = 1, rows: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """A figure under a title, `height` in inches, with its axes row by row."""
    sns.set_theme(context="notebook", style="ticks", font_scale=1.05)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options)
    figure.suptitle(title, fontsize="medium", fontweight="bold", wrap=True)
    sns.despine(figure)
    plt.close(figure)  # the notebook shows what a cell displays, once
    return figure, list(axes.flat)


def new_panels(title: str, names: Sequence[str], xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a name, three a row, with one y axis. Labels stand at its outer axes only."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_axes(title, height=2.1 * rows + 1.2, columns=columns, rows=rows, sharey=True)
    for position, axis in enumerate(axes):
        axis.set_visible(position < len(names))
        if position >= len(names) - columns:  # nothing is drawn below
            axis.set_xlabel(xlabel)
        if position % columns == 0:
            axis.set_ylabel(ylabel)
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(textwrap.fill(name, 17), fontsize="medium")
    return figure, axes[: len(names)]


def legend_below(figure: Figure, axis: Axes, columns: int = 1, title: str | None = None) -> None:
    """The legend of an axis, below the whole figure: there it hides nothing on a phone."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", fontsize="small", ncols=columns, title=title)


def in_thousands(tokens: float, _position: int) -> str:
    if tokens == 0:
        return "0"
    return f"{tokens / 1e6:g} M" if tokens >= 1e6 else f"{tokens / 1e3:g} k"


def shares_of_matches(features: pd.DataFrame) -> pd.Series:
    """Per cent of the features that come back in 0, 1, ..., all of the other seeds. Columns: matches, trials."""
    counts = range(int(features["trials"].iloc[0]) + 1)
    return 100 * features["matches"].value_counts(normalize=True).reindex(counts, fill_value=0)


def count_ticks(axis: Axes, largest: int) -> None:
    """Ticks at whole numbers from 0, few enough to be read in a panel."""
    axis.set_xticks(range(0, largest + 1, max(1, -(-largest // 6))))


def stacked(axis: Axes, table: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """One bar a band of what share of its features has each of the `names` in `column`. Columns: band, and that one."""
    bands = [band for band in BANDS if band in set(table["band"])]
    start = np.zeros(len(bands))
    for name, shade in zip(names, SHADES[: len(names) - 1] + SHADES[-1:], strict=True):
        share = np.array([100 * (table.loc[table["band"] == band, column] == name).mean() for band in bands])
        axis.barh(bands, share, left=start, color=shade, edgecolor="white", label=name)
        start += share
    axis.invert_yaxis()


def band_histograms(axis: Axes, table: pd.DataFrame, column: str, bins: Float[np.ndarray, "edge"]) -> None:
    """The distribution of a quantity in each band that has features, as outlines. Columns: band, and that one."""
    for band, style in BAND_STYLES.items():
        values = table.loc[table["band"] == band, column].clip(bins[0], bins[-1])
        if values.empty:
            continue
        options = {"histtype": "step", "color": style.colour, "linestyle": style.line, "linewidth": 1.8}
        axis.hist(values, bins, density=True, label=band, **options)
    axis.set_yticks([])


def line_with_interval(axis: Axes, table: pd.DataFrame, x: str, y: str, kind: str, marker: str | None = None) -> None:
    """An estimate of a kind as a line, with its interval around it. Columns: `x`, `y`, `y`_low and `y`_high."""
    style = KINDS[kind]
    axis.plot(table[x], table[y], linestyle=style.line, marker=marker, color=style.colour, label=style.name)
    axis.fill_between(table[x], table[f"{y}_low"], table[f"{y}_high"], color=style.colour, alpha=0.2, linewidth=0)
