"""What claims find on many cells: a row a cell, with its interval, against the bound of the claim."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, new_axes

SIDES = {
    "beyond the bound": (BAND_STYLES["stable"].colour, "o"),
    "on the bound": ("#8C8C8C", "s"),
    "short of the bound": (BAND_STYLES["unstable"].colour, "^"),
}
"""How a cell is drawn, by where its whole interval lies."""
LONGEST = 24
"""Characters of a cell's name: a longer one would leave no room for the panels."""
REACH = 2.5
"""Cells that lie further out than so many times the range of the middle 80 % are drawn at the edge."""


@recorded
def forest(effects: pd.DataFrame, panels: Sequence[tuple[str, str, str]], title: str) -> Figure:
    """One panel for each of the `panels` (claim, line, and what its axis says), all with the same rows.

    Columns: id, line, position (of the row), name, axis, value, low, high, bound, margin. An arrow marks what lies outside.
    """
    rows = effects.drop_duplicates("position").sort_values("position")
    height = 0.24 * len(rows) + 1.9
    figure, axes = new_axes(title, height=height, columns=len(panels), sharey=True)
    place = {position: place for place, position in enumerate(rows["position"])}
    for axis, (claim, line, label) in zip(axes, panels, strict=True):
        chosen = effects[(effects["id"] == claim) & (effects["line"] == line)]
        axis.set_title(claim, fontsize="medium")
        axis.set_xlabel(textwrap.fill(label, 14), fontsize="small")
        if chosen.empty:  # seeds are few
            axis.text(0.5, 0.5, "no interval\nin any cell", transform=axis.transAxes, ha="center", va="center", fontsize="small")
            continue
        left, right = limits(chosen)
        for row in chosen.itertuples():
            colour, marker = SIDES[side(row)]
            inside = float(np.clip(row.value, left, right))
            if inside != row.value:
                marker = ">" if row.value > right else "<"
            y = place[row.position]
            axis.plot([max(row.low, left), min(row.high, right)], [y, y], color=colour, linewidth=1.6)
            axis.plot(inside, y, marker, color=colour, markersize=5, clip_on=False)
        axis.axvline(chosen["bound"].iloc[0], color="black", linestyle=":", linewidth=1)
        axis.set_xlim(left, right)
        changes = np.flatnonzero(rows["axis"].to_numpy()[1:] != rows["axis"].to_numpy()[:-1])
        for change in changes:
            axis.axhline(change + 0.5, color="#DDDDDD", linewidth=0.8)
    axes[0].set_yticks(
        range(len(rows)), [textwrap.shorten(name, LONGEST, placeholder=" …") for name in rows["name"]], fontsize="small"
    )
    axes[0].set_ylim(max(len(rows), 1) - 0.5, -0.5)
    handles = [Line2D([], [], color=colour, marker=marker, linewidth=1.6) for colour, marker in SIDES.values()]
    figure.legend(handles, list(SIDES), frameon=False, loc="outside lower center", fontsize="small", ncols=1)
    return figure


def side(row) -> str:
    """Where the whole interval of a cell lies, as the claim has it."""
    reach = (row.high - row.low) / 2
    if row.margin > reach:
        return "beyond the bound"
    return "short of the bound" if row.margin < -reach else "on the bound"


def limits(chosen: pd.DataFrame) -> tuple[float, float]:
    """The ends of an axis on which most cells and the bound are seen."""
    middle, spread = chosen["value"].median(), np.ptp(chosen["value"].quantile([0.1, 0.9]))
    near = chosen[(chosen["value"] - middle).abs() <= REACH * max(spread, 1e-9)]
    ends = [near["low"].min(), near["high"].max(), chosen["bound"].iloc[0]]
    pad = 0.05 * (max(ends) - min(ends))
    return min(ends) - pad, max(ends) + pad
