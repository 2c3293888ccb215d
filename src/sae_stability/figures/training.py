"""How training went, what it cost, how often features fire."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, KINDS, in_thousands, legend_below, new_axes, series_style


@recorded
def training_curves(curve: pd.DataFrame, title: str) -> Figure:
    """Explained variance of each seed against training tokens. Columns: seed, kind, tokens, explained_variance."""
    figure, (axis,) = new_axes(title)
    for kind, part in curve.groupby("kind", sort=False):
        style = KINDS[kind]
        sns.lineplot(
            part, x="tokens", y="explained_variance", units="seed", estimator=None, ax=axis,
            color=style.colour, linestyle=style.line, alpha=0.6, linewidth=1, label=style.name,
        )  # fmt: skip
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), frameon=False, title="one line a seed, trained on")
    top = curve["explained_variance"].max()
    late = curve[curve["tokens"] > 0.1 * curve["tokens"].max()]["explained_variance"].min()
    axis.set(
        xlabel="training tokens",
        ylabel="explained variance of the batches",
        ylim=(late - 0.25 * (top - late) - 0.005, top + 0.01),
    )
    axis.xaxis.set_major_formatter(in_thousands)
    return figure


@recorded
def cell_curves(curve: pd.DataFrame, title: str) -> Figure:
    """Explained variance of each seed of each cell. Columns: name, seed, tokens, explained_variance."""
    names = curve["name"].unique()
    columns = 3 if max(map(len, names)) < 16 else 1
    figure, (axis,) = new_axes(title, height=4.2 + 0.3 * -(-len(names) // columns))
    for position, (name, cell) in enumerate(curve.groupby("name", sort=False)):
        colour, line = series_style(position)
        end = cell.loc[cell["tokens"] == cell["tokens"].max(), "explained_variance"].mean()
        label = f"{name}, {end:.3f}"
        for _, seed in cell.groupby("seed"):
            axis.plot(seed["tokens"], seed["explained_variance"], linestyle=line, color=colour, linewidth=1, label=label)
            label = None  # one entry in the legend a cell
    late = curve.loc[curve["tokens"] > 0.2 * curve["tokens"].max(), "explained_variance"]
    low, high = late.min(), late.max()
    axis.set(
        xlabel="training tokens",
        ylabel="explained variance of the batches",
        ylim=(low - 0.1 * (high - low), high + 0.05 * (high - low)),
    )
    legend_below(figure, axis, columns, title="one line a seed, its cell and end")
    axis.xaxis.set_major_formatter(in_thousands)
    return figure


@recorded
def step_times(times: pd.DataFrame, floor_ms: float, title: str) -> Figure:
    """Milliseconds a step and seed takes. Columns: contestant, ms."""
    figure, (axis,) = new_axes(title, height=0.45 * len(times) + 1.4)
    ordered = times.sort_values("ms", ascending=False)
    ours, theirs = KINDS["real"].colour, BAND_STYLES["intermediate"].colour
    colours = [ours if name.startswith("ours") else theirs for name in ordered["contestant"]]
    bars = axis.barh(ordered["contestant"], ordered["ms"], color=colours, height=0.7)
    axis.bar_label(bars, [f"{value:.0f}" for value in ordered["ms"]], padding=3, fontsize="small")
    axis.axvline(floor_ms, color="black", linestyle=":", label=f"floor, {floor_ms:.0f} ms")
    axis.set(xlabel="milliseconds a step and seed", xlim=(0, ordered["ms"].max() * 1.12))
    axis.legend(frameon=False, loc="upper right")
    return figure


@recorded
def frequencies(features: pd.DataFrame, title: str) -> Figure:
    """How often live features fire. Columns: frequency."""
    figure, (axis,) = new_axes(title)
    sns.histplot(np.log10(features["frequency"]), bins=40, color=KINDS["real"].colour, ax=axis, stat="percent")
    axis.set(xlabel="share of tokens on which the feature fires", ylabel="% of live features")
    axis.xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:g}}}$")
    return figure
