"""What features fire on: classes of triggers, and how the bands differ."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, band_histograms, legend_below, new_axes, stacked
from sae_stability.triggers import CLASSES

QUANTITIES = {
    "frequency": "fires often",
    "explained_token": "the token tells",
    "explained_previous": "the token before tells",
    "explained_n-gram": "both together tell",
    "explained_position": "the position tells",
    "top_share": "fires on one token",
    "rarity": "fires on rare tokens",
}


@recorded
def trigger_classes(table: pd.DataFrame, title: str) -> Figure:
    """Classes of triggers by band, all features and those of equal frequency. Columns: band, trigger, equal_frequency."""
    known = table[table["trigger"] != "too rare"]
    panels = {"all features": table, "of equal frequency": known[known["equal_frequency"]]}
    figure, axes = new_axes(title, height=5.4, rows=2, sharex=True)
    for axis, (name, part) in zip(axes, panels.items(), strict=True):
        stacked(axis, part, "trigger", CLASSES)
        axis.set_title(name, fontsize="medium")
    axes[-1].set_xlabel("% of the features")
    legend_below(figure, axes[0], columns=3)
    return figure


@recorded
def deltas(table: pd.DataFrame, title: str) -> Figure:
    """Cliff's delta of unstable against stable features. Columns: features, quantity, delta, delta_low, delta_high."""
    figure, (axis,) = new_axes(title, height=4.6)
    colour = BAND_STYLES["unstable"].colour
    styles = {"all": ("o", True, -0.15, "all features"), "equal frequency": ("D", False, 0.15, "of equal frequency")}
    for chosen, (marker, filled, shift, label) in styles.items():
        part = table[table["features"] == chosen].set_index("quantity").reindex(QUANTITIES)
        at = np.arange(len(part)) + shift
        axis.hlines(at, part["delta_low"], part["delta_high"], color=colour, linewidth=1.5)
        face = colour if filled else "white"
        axis.plot(part["delta"], at, marker, color=colour, markerfacecolor=face, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(QUANTITIES)), QUANTITIES.values())
    axis.invert_yaxis()
    axis.set(xlabel="Cliff's delta, unstable against stable", xlim=(-1.05, 1.05))
    legend_below(figure, axis, columns=2)
    return figure


@recorded
def token_tells(table: pd.DataFrame, title: str) -> Figure:
    """How much of their variance the token tells, by band, beside a shuffled text. Columns: band, explained_token, null_token."""
    figure, (axis,) = new_axes(title)
    band_histograms(axis, table, "explained_token", np.linspace(-0.1, 1, 23))
    null = table["null_token"].quantile(0.99)
    axis.axvline(null, color="black", linewidth=1, label="99 % of features, text shuffled")
    axis.set(xlabel="share of the variance that the token tells", ylabel="density of features")
    axis.legend(frameon=False)
    return figure
