"""Shares of shared features, by every rule."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import KINDS, legend_below, new_axes

NAMES = {
    "decoder": "decoder,\none-sided",
    "mutual": "decoder,\nmutual",
    "one-to-one": "decoder,\none to one",
    "encoder": "encoder,\none-sided",
    "decoder and encoder": "decoder and\nencoder",
    "mcc": "mean cosine,\none to one",
}
"""What readers call the rules, in the order in which they are drawn."""
MARKERS = {0.5: "<", 0.7: "o", 0.9: ">"}


@recorded
def rules(table: pd.DataFrame, title: str) -> Figure:
    """One line a rule, from the share of features that come back in every other seed to that in some; the mark is for one other.

    Columns: kind, criterion, threshold, where, share.
    """
    figure, (axis,) = new_axes(title, height=6.4)
    names = [name for name in NAMES if name in set(table["criterion"])][::-1]
    for (kind, criterion, threshold), rows in table.groupby(["kind", "criterion", "threshold"], dropna=False, sort=False):
        shares, colour = rows.set_index("where")["share"], KINDS[kind].colour
        step = 0 if np.isnan(threshold) else list(MARKERS).index(threshold) - 1
        height = names.index(criterion) - 0.27 * step - (0.11 if kind == "surrogate" else 0)
        if "some" in shares:
            axis.plot([shares["every"], shares["some"]], [height, height], color=colour, linewidth=1.5, linestyle=KINDS[kind].line)
        marker = "D" if np.isnan(threshold) else MARKERS[threshold]
        axis.plot(shares["another"], height, marker, color=colour, markersize=6)
    for kind in dict.fromkeys(table["kind"]):
        axis.plot([], [], color=KINDS[kind].colour, linestyle=KINDS[kind].line, label=KINDS[kind].name)
    for threshold, marker in MARKERS.items():
        axis.plot([], [], marker, color="black", label=f"cosine of {threshold:g}")
    axis.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axis.set(xlabel="share of live features that are shared", xlim=(-0.02, 1.02), ylim=(-0.6, len(names) - 0.4))
    for edge in range(1, len(names)):
        axis.axhline(edge - 0.5, color="#DDDDDD", linewidth=0.8)
    legend_below(figure, axis, columns=2)
    return figure
