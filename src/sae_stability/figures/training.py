"""How training went, what it cost, how often features fire."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sae_stability.figures.style import COLOURS, DASH_CYCLE, DASHES, NAMES, VARIANT_COLOURS, in_thousands, new_axes


def training_curves(curve: pd.DataFrame, title: str) -> Figure:
    """Explained variance of each seed against training tokens. Columns: seed, kind, tokens, explained_variance."""
    figure, (axis,) = new_axes(title)
    for kind, part in curve.groupby("kind", sort=False):
        sns.lineplot(
            part, x="tokens", y="explained_variance", units="seed", estimator=None, ax=axis,
            color=COLOURS[kind], linestyle=DASHES[kind], alpha=0.6, linewidth=1, label=NAMES[kind],
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


def variant_curves(curve: pd.DataFrame, title: str) -> Figure:
    """Explained variance of each seed of each variant. Columns: variant, seed, tokens, explained_variance."""
    figure, (axis,) = new_axes(title, height=4.8)
    names = list(dict.fromkeys(curve["variant"]))
    late = curve[curve["tokens"] > 0.2 * curve["tokens"].max()]
    ends = curve[curve["tokens"] == curve["tokens"].max()].groupby("variant")["explained_variance"].mean()
    for place, name in enumerate(names):
        for index, (_, part) in enumerate(curve[curve["variant"] == name].groupby("seed")):
            axis.plot(
                part["tokens"], part["explained_variance"], DASH_CYCLE[place % 2], color=VARIANT_COLOURS[place], linewidth=1,
                label=f"{name}, {ends[name]:.3f}" if index == 0 else None,
            )  # fmt: skip
    low, high = late["explained_variance"].min(), late["explained_variance"].max()
    axis.set(
        xlabel="training tokens",
        ylabel="explained variance of the batches",
        ylim=(low - 0.1 * (high - low), high + 0.05 * (high - low)),
    )
    figure.legend(
        frameon=False, title="one line a seed, its variant and end", ncols=3, loc="outside lower center", fontsize="small"
    )
    axis.xaxis.set_major_formatter(in_thousands)
    return figure


def step_times(times: pd.DataFrame, floor_ms: float, title: str) -> Figure:
    """Milliseconds a step and seed takes. Columns: contestant, ms."""
    figure, (axis,) = new_axes(title, height=0.45 * len(times) + 1.4)
    ordered = times.sort_values("ms", ascending=False)
    colours = [COLOURS["real"] if name.startswith("ours") else COLOURS["intermediate"] for name in ordered["contestant"]]
    bars = axis.barh(ordered["contestant"], ordered["ms"], color=colours, height=0.7)
    axis.bar_label(bars, [f"{value:.0f}" for value in ordered["ms"]], padding=3, fontsize="small")
    axis.axvline(floor_ms, color="black", linestyle=":", label=f"floor, {floor_ms:.0f} ms")
    axis.set(xlabel="milliseconds a step and seed", xlim=(0, ordered["ms"].max() * 1.12))
    axis.legend(frameon=False, loc="upper right")
    return figure


def frequencies(features: pd.DataFrame, title: str) -> Figure:
    """How often live features fire. Columns: frequency."""
    figure, (axis,) = new_axes(title)
    sns.histplot(np.log10(features["frequency"]), bins=40, color=COLOURS["real"], ax=axis, stat="percent")
    axis.set(xlabel="share of tokens on which the feature fires", ylabel="% of live features")
    axis.xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:g}}}$")
    return figure
