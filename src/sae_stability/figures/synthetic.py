"""What SAEs find of worlds whose features are known."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import MARKERS, legend_below, new_axes, series_style


@recorded
def found_and_spanned(kinds: Mapping[str, pd.DataFrame], columns: Mapping[str, str], title: str) -> Figure:
    """One row a kind of world, with a mark a world for each of some shares. `columns` names them for readers."""
    figure, (axis,) = new_axes(title, height=1.1 * len(kinds) + 1.8)
    names = list(kinds)[::-1]
    for position, (column, label) in enumerate(columns.items()):
        colour, _ = series_style(position)
        for place, name in enumerate(names):
            values = kinds[name][column].dropna()
            heights = place + 0.25 - 0.25 * position + np.linspace(-0.06, 0.06, max(len(values), 1))[: len(values)]
            axis.plot(
                values, heights, MARKERS[position], color=colour, markersize=7, alpha=0.8, label=label if place == 0 else None
            )
    axis.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axis.set(xlabel="share, one mark a world", xlim=(-0.03, 1.03), ylim=(-0.6, len(names) - 0.4))
    for edge in range(1, len(names)):
        axis.axhline(edge - 0.5, color="#DDDDDD", linewidth=0.8)
    legend_below(figure, axis, columns=1)
    return figure


@recorded
def against_theory(worlds: pd.DataFrame, title: str) -> Figure:
    """The stability of the latents of blocks without preferred directions, against p(r, M). Columns: r, expected_p, p_in_blocks."""
    figure, (axis,) = new_axes(title, height=4.4)
    for position, (r, of_size) in enumerate(worlds.groupby("r")):
        colour, _ = series_style(position)
        marker = MARKERS[position % len(MARKERS)]
        axis.plot(of_size["expected_p"], of_size["p_in_blocks"], marker, color=colour, markersize=7, label=f"r = {r}")
    axis.plot([0, 1], [0, 1], color="#999999", linestyle=":", zorder=0)
    axis.set(xlabel="stability of as many random directions, p(r, M)", ylabel="stability of the block's latents")
    legend_below(figure, axis, columns=4)
    return figure


@recorded
def phase(worlds: pd.DataFrame, rows: str, columns: str, value: str, labels: tuple[str, str, str], title: str) -> Figure:
    """A share at each choice of two parameters, on average over draws of the world. `labels` of rows, columns and the share."""
    figure, (axis,) = new_axes(title, height=4.6)
    table = worlds.pivot_table(index=rows, columns=columns, values=value, dropna=False)
    sns.heatmap(
        table, ax=axis, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", annot_kws={"size": 9}, cbar_kws={"label": labels[2]}
    )
    axis.set(ylabel=labels[0], xlabel=labels[1])
    axis.tick_params(rotation=0)
    return figure


@recorded
def stable_or_true(worlds: pd.DataFrame, title: str) -> Figure:
    """Stability of the latents of blocks against the share of their features that is found, a mark a world. Columns: active,
    found_in_blocks, p_in_blocks."""
    figure, (axis,) = new_axes(title, height=4.6)
    laws = worlds["active"].fillna(0)
    for position, law in enumerate(sorted(set(laws))):
        colour, _ = series_style(position)
        of_law = worlds[laws == law]
        name = f"{law:.0f} active at a time" if law else "no preferred directions"
        axis.plot(
            of_law["found_in_blocks"], of_law["p_in_blocks"], MARKERS[position % len(MARKERS)], color=colour, alpha=0.75, label=name
        )
    axis.axvline(0.9, color="#999999", linestyle=":", zorder=0)
    axis.axhline(0.9, color="#999999", linestyle=":", zorder=0)
    axis.text(0.02, 0.97, "stable and false", fontsize="small", va="top", color="#555555")
    axis.set(
        xlabel="share of the block's features that is found",
        ylabel="stability of its latents",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    legend_below(figure, axis, columns=2)
    return figure


@recorded
def told_apart(areas: pd.DataFrame, title: str) -> Figure:
    """How well diagnostics tell axes of blocks from other latents. Columns: name, other, roc, roc_low, roc_high."""
    names = list(dict.fromkeys(areas["name"]))[::-1]
    figure, (axis,) = new_axes(title, height=2.4 + 0.5 * len(names))
    for position, (other, rows) in enumerate(areas.groupby("other", sort=False)):
        colour, _ = series_style(position)
        places = np.array([names.index(name) for name in rows["name"]]) + 0.12 - 0.24 * position
        reach = np.abs(rows[["roc_low", "roc_high"]].sub(rows["roc"], axis=0)).to_numpy().T
        axis.errorbar(
            rows["roc"], places, xerr=reach, color=colour, marker=MARKERS[position], linestyle="none", capsize=3, label=other
        )
    axis.axvline(0.5, color="#8C8C8C", linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="area under the ROC curve", xlim=(None, 1.02), ylim=(-0.6, len(names) - 0.4))
    legend_below(figure, axis, columns=2)
    return figure
