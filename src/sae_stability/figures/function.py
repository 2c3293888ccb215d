"""What features do: bands beside their controls, cumulative curves, single features, other seeds."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import NullLocator

from sae_stability.figures.record import recorded
from sae_stability.figures.style import BAND_STYLES, KINDS, band_histograms, legend_below, new_axes, stacked
from sae_stability.matching import BANDS

SET_STYLES = {  # marker, filled, what the legend says
    "band": ("o", True, "the band"),
    "random": ("D", False, "as many random features"),
    "paired": ("s", True, "those of the band that have a match"),
    "matched": ("s", False, "their matches outside the band"),
}
MEASURE_NAMES = {
    "reconstruction": "explained variance,\ncodes fixed",
    "reselected": "explained variance,\ncodes chosen again",
    "prediction": "cross-entropy",
}
ORDER_STYLES = {
    "stability": ("#0072B2", "-", "most stable first"),
    "energy": ("#009E73", "--", "most energetic first"),
    "frequency": ("#E69F00", "-.", "most frequent first"),
    "random": ("#000000", ":", "at random"),
}
WEIGHT_NAMES = {
    "features": "features",
    "energy": "their energy",
    "reconstruction": "their impact on\nreconstruction",
    "prediction": "their impact on\nprediction",
}
KIND_MARKERS = {"real": "o", "surrogate": "s", "surrogate at equal frequency": "D"}


@recorded
def reappearing(table: pd.DataFrame, title: str) -> Figure:
    """What comes back in another seed, by what a feature counts for. Columns: kind, weight, share, share_low, share_high."""
    figure, (axis,) = new_axes(title, height=3.8)
    for place, (kind, marker) in enumerate(KIND_MARKERS.items()):
        colour = KINDS["real" if kind == "real" else "surrogate"].colour
        for position, weight in enumerate(WEIGHT_NAMES):
            rows = table[(table["kind"] == kind) & (table["weight"] == weight)]
            _point(axis, position + 0.15 * (place - 1), rows, "share", colour, marker, kind != "surrogate at equal frequency")
    axis.set_xticks(range(len(WEIGHT_NAMES)), WEIGHT_NAMES.values())
    axis.set(ylabel="share that comes back", ylim=(0, 1))
    handles = [
        Line2D(
            [], [], linestyle="none", marker=marker, color=KINDS[kind.split()[0]].colour, label=label,
            markerfacecolor="white" if "frequency" in kind else KINDS[kind.split()[0]].colour,
        )
        for (kind, marker), label in zip(KIND_MARKERS.items(), ("model", "surrogate", "surrogate, equal frequency"), strict=True)
    ]  # fmt: skip
    figure.legend(handles=handles, frameon=False, loc="outside lower center", fontsize="small", ncols=3)
    return figure


@recorded
def asymmetry(table: pd.DataFrame, title: str) -> Figure:
    """Share that each band carries, beside its controls; a panel a measure. Columns: measure, set, of, share, _low, _high."""
    measures = [name for name in MEASURE_NAMES if name in set(table["measure"])]
    figure, axes = new_axes(title, height=4.4, columns=len(measures), sharey=True)
    for axis, measure in zip(axes, measures, strict=True):
        part = table[table["measure"] == measure]
        sets = [name for name in SET_STYLES if name in set(part["set"])]
        for place, name in enumerate(sets):
            marker, filled, _ = SET_STYLES[name]
            for position, band in enumerate(BANDS):
                rows = part[(part["set"] == name) & (part["of"] == band)]
                at = position + 0.2 * (place - (len(sets) - 1) / 2)
                _point(axis, at, rows, "share", BAND_STYLES[band].colour, marker, filled)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(MEASURE_NAMES[measure], fontsize="medium")
        axis.set_xticks(range(len(BANDS)), BANDS, rotation=30, ha="right")
    axes[0].set_ylabel("lost, as a share of all")
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color="black", markerfacecolor="black" if filled else "white", label=label)
        for marker, filled, label in SET_STYLES.values()
    ]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", fontsize="small")
    return figure


@recorded
def overlap(features: pd.DataFrame, title: str) -> Figure:
    """Energy and frequency of the features of each band. Columns: band, log_energy, log_frequency (powers of ten)."""
    panels = {"log_energy": "share of all energy", "log_frequency": "share of tokens"}
    figure, axes = new_axes(title, columns=2)
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        band_histograms(axis, features, column, np.histogram_bin_edges(features[column], 30))
        axis.set_xlabel(f"{label}, log10")
    axes[0].set_ylabel("density of features")
    legend_below(figure, axes[0], columns=len(BANDS))
    return figure


@recorded
def cumulative(table: pd.DataFrame, sizes: dict[str, float], title: str) -> Figure:
    """What is kept as features are added, in several orders; a panel a measure. Columns: measure, order, added, share, _low, _high.

    `sizes` are the shares of the outer bands: where the stable ones end, and where the unstable ones begin.
    """
    measures = [name for name in MEASURE_NAMES if name in set(table["measure"])]
    figure, axes = new_axes(title, height=4.2, columns=len(measures), sharey=True)
    for axis, measure in zip(axes, measures, strict=True):
        for order, (colour, line, label) in ORDER_STYLES.items():
            part = table[(table["measure"] == measure) & (table["order"] == order)].sort_values("added")
            axis.plot(part["added"], part["share"], color=colour, linestyle=line, marker="o", markersize=4, label=label)
            axis.fill_between(part["added"], part["share_low"], part["share_high"], color=colour, alpha=0.15, linewidth=0)
        for band, at in (("stable", sizes["stable"]), ("unstable", 1 - sizes["unstable"])):
            axis.axvline(at, color=BAND_STYLES[band].colour, linewidth=1)
        axis.set_title(MEASURE_NAMES[measure], fontsize="medium")
        axis.set_xlabel("share of the features kept")
        axis.set_xticks([0, 0.5, 1])
    axes[0].set_ylabel("share of what all carry")
    legend_below(figure, axes[0], columns=2)
    return figure


@recorded
def impact_scatter(features: pd.DataFrame, title: str) -> Figure:
    """Stability against what a removal alone does. Columns: stability, band, impact_reconstruction, impact_prediction."""
    panels = {
        "impact_reconstruction": (100, "lost explained\nvariance, %"),
        "impact_prediction": (1e6, "added cross-entropy,\nµnats a token"),
    }
    figure, axes = new_axes(title, height=4.4, columns=2)
    generator = np.random.default_rng(0)
    for axis, (column, (scale, label)) in zip(axes, panels.items(), strict=True):
        values = features[column] * scale
        linear = np.quantile(values.abs(), 0.2)
        for band, style in BAND_STYLES.items():
            part = features["band"] == band
            spread = features.loc[part, "stability"] + generator.uniform(-0.025, 0.025, part.sum())
            axis.scatter(spread, values[part], s=4, alpha=0.25, color=style.colour, marker=style.marker, linewidths=0)
        means = values.groupby(features["stability"]).mean()
        axis.plot(means.index, means, color="black", marker="_", markersize=12, linewidth=1, label="mean")
        axis.axhline(0, color="black", linewidth=0.6)
        _signed_log(axis, "y", max(linear, 1e-12), float(values.min()), float(values.max()))
        axis.set(xlabel="stability", ylabel=label)
        axis.legend(frameon=False, loc="lower right")
    return figure


@recorded
def orders_check(sample: pd.DataFrame, title: str) -> Figure:
    """Approximate impact on prediction against the true one. Columns: band, first_order, second_order, true (nats a token)."""
    values = sample[["first_order", "second_order", "true"]] * 1e6
    linear = max(float(values["true"].abs().quantile(0.2)), 1e-9)
    figure, axes = new_axes(title, height=4.0, columns=2, sharey=True)
    for axis, order in zip(axes, ("first_order", "second_order"), strict=True):
        for band, style in BAND_STYLES.items():
            part = sample["band"] == band
            true, approximate = values.loc[part, "true"], values.loc[part, order]
            axis.scatter(true, approximate, s=18, color=style.colour, marker=style.marker, label=band)
        ends = [float(values.min().min()), float(values.max().max())]
        axis.plot(ends, ends, color="black", linewidth=0.8, label="equal")
        for along in ("x", "y"):
            _signed_log(axis, along, linear, *ends)
        axis.set_title(order.replace("_", " "), fontsize="medium")
        axis.set_xlabel("true change, µnats")
    axes[0].set_ylabel("approximate change,\nµnats a token")
    legend_below(figure, axes[0], columns=4)
    return figure


@recorded
def fates(table: pd.DataFrame, names: tuple[str, ...], title: str) -> Figure:
    """What became of features in another seed: a stacked bar a band. Columns: band, fate."""
    figure, (axis,) = new_axes(title, height=2.6)
    stacked(axis, table, "fate", names)
    axis.set(xlabel="% of the features of the band")
    legend_below(figure, axis, columns=len(names))
    return figure


@recorded
def transplants(table: pd.DataFrame, title: str) -> Figure:
    """What the model loses where another seed writes a band's contribution. Columns: band, what, change, _low, _high."""
    names = {"removed": "removed", "averaged": "set to its mean", "transplanted": "written by\nanother seed"}
    figure, axes = new_axes(title, height=4.2, columns=2)
    for axis, band in zip(axes, ("stable", "unstable"), strict=True):
        for place, what in enumerate(names):
            rows = table[(table["band"] == band) & (table["what"] == what)]
            _point(axis, place, rows, "change", BAND_STYLES[band].colour, "o", True)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"{band} features", fontsize="medium")
        axis.set_xticks(range(len(names)), names.values(), rotation=30, ha="right")
        axis.set_xlim(-0.5, len(names) - 0.5)
    axes[0].set_ylabel("added cross-entropy,\nnats a token")
    return figure


def _point(axis, at: float, rows: pd.DataFrame, column: str, colour: str, marker: str, filled: bool) -> None:
    """An estimate with its interval, drawn where there is one."""
    if rows.empty or not np.isfinite(rows[column].iloc[0]):
        return
    row = rows.iloc[0]
    if np.isfinite(row[f"{column}_low"]):
        axis.plot([at, at], [row[f"{column}_low"], row[f"{column}_high"]], color=colour, linewidth=1.5)
    face = colour if filled else "white"
    axis.plot([at], [row[column]], marker=marker, markersize=6, color=colour, markerfacecolor=face, linestyle="none")


def _signed_log(axis, along: str, linear: float, lowest: float, highest: float) -> None:
    """A scale along `x` or `y` that is logarithmic on both sides of zero, with few enough ticks to be read on a phone."""
    decade = 10.0 ** np.floor(np.log10(max(abs(lowest), abs(highest))))
    marked = [decade, *([decade / 10] if along == "y" and decade / 10 > linear else [])]
    ticks = [tick for tick in (*(-mark for mark in marked), 0, *marked) if tick >= min(lowest, 0)]
    axis.set(**{f"{along}scale": SymmetricalLogScale(None, linthresh=linear), f"{along}ticks": ticks})
    getattr(axis, f"{along}axis").set_minor_locator(NullLocator())
