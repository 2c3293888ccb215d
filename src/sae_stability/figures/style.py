"""What all figures share: size, colours, names and line styles.

Colours are those of Okabe & Ito, told apart by colour-blind readers; a band has the same colour everywhere, and what is
told by colour is told by line style or marker too.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_stability.matching import BANDS

COLOURS = {
    "stable": "#0072B2",
    "intermediate": "#8C8C8C",
    "unstable": "#D55E00",
    "real": "#0072B2",
    "surrogate": "#CC79A7",
    "randomised": "#009E73",
    "random directions": "#000000",
    "untrained SAE": "#E69F00",
}
BAND_MARKERS = {"stable": "o", "intermediate": "s", "unstable": "^"}
BAND_LINES = {"stable": "-", "intermediate": ":", "unstable": "--"}
DASHES = {"real": "-", "surrogate": "--", "randomised": "-.", "random directions": ":", "untrained SAE": (0, (1, 3))}
HATCHES = {"real": "", "surrogate": "//", "randomised": ".."}
NAMES = {
    "real": "language model",
    "surrogate": "Gaussian surrogate",
    "randomised": "shuffled weights",
    "random directions": "random, same covariance",
    "untrained SAE": "untrained SAEs",
}
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#CC79A7", "#999999", "#DDDDDD")
VARIANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00")
DASH_CYCLE = ("-", "--")
WIDTH = 5.6  # inches: text stays readable when a phone shrinks the figure


def new_axes(title: str, height: float = 3.6, columns: int = 1, rows: int = 1, **options) -> tuple[Figure, list]:
    sns.set_theme(context="notebook", style="ticks", font_scale=1.05)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options)
    figure.suptitle(title, fontsize="medium", fontweight="bold", wrap=True)
    sns.despine(figure)
    plt.close(figure)  # the notebook shows what a cell displays, once
    return figure, list(axes.flat)


def in_thousands(tokens: float, _position: int) -> str:
    if tokens == 0:
        return "0"
    return f"{tokens / 1e6:g} M" if tokens >= 1e6 else f"{tokens / 1e3:g} k"


def stacked(axis, table: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """One bar a band of what share of its features has each of the `names` in `column`. Columns: band, and that one."""
    bands = [band for band in BANDS if band in set(table["band"])]
    start = np.zeros(len(bands))
    for name, shade in zip(names, SHADES[: len(names) - 1] + SHADES[-1:], strict=True):
        share = np.array([100 * (table.loc[table["band"] == band, column] == name).mean() for band in bands])
        axis.barh(bands, share, left=start, color=shade, edgecolor="white", label=name)
        start += share
    axis.invert_yaxis()


def band_histograms(axis, table: pd.DataFrame, column: str, bins: Float[np.ndarray, "edge"]) -> None:
    """The distribution of a quantity in each band, as outlines. Columns: band, and that one."""
    for band in BANDS:
        values = table.loc[table["band"] == band, column].clip(bins[0], bins[-1])
        axis.hist(
            values, bins, density=True, histtype="step", color=COLOURS[band], linestyle=BAND_LINES[band], linewidth=1.8, label=band
        )
    axis.set_yticks([])
