"""What stages of studies take, beside what was expected of them."""

from collections.abc import Mapping

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import MARKERS, legend_below, new_axes, series_style

ROW = 6
"""Kinds of stages beside one another."""


@recorded
def expected_seconds(jobs: pd.DataFrame, kinds: list[str], title: str) -> Figure:
    """Seconds of each job against those that the other jobs of its kind let expect; on the line they are equal.

    Columns: kind, seconds, ratio (of the expected to the true). Kinds that are not named are drawn together.
    """
    figure, (axis,) = new_axes(title, height=5.0)
    known = jobs.dropna(subset=["ratio"])
    expected = known["seconds"] * known["ratio"]
    ends = np.array([min(known["seconds"].min(), expected.min()), max(known["seconds"].max(), expected.max())])
    axis.plot(ends, ends, color="#8C8C8C", linewidth=1)
    for position, kind in enumerate([*kinds, "other"]):
        chosen = ~known["kind"].isin(kinds) if kind == "other" else known["kind"] == kind
        colour, _ = series_style(position)
        axis.scatter(known["seconds"][chosen], expected[chosen], color=colour, marker=MARKERS[position], s=36, label=kind)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set(xlabel="seconds that a stage took", ylabel="seconds expected from its kind")
    legend_below(figure, axis, columns=3)
    return figure


@recorded
def stages(reads: Mapping[str, set[str]], title: str) -> Figure:
    """What each kind of stage reads, from top to bottom; only what it reads at first hand."""
    graph = nx.DiGraph((before, kind) for kind, read in reads.items() for before in read)
    graph.add_nodes_from(reads)
    graph = nx.transitive_reduction(graph)
    rows = [sorted(row, key=list(reads).index) for row in nx.topological_generations(graph)]
    # A long row is cut, since labels need room on a phone.
    rows = [row[start : start + ROW] for row in rows for start in range(0, len(row), ROW)]
    place = {kind: ((number + 0.5) / len(row), -depth) for depth, row in enumerate(rows) for number, kind in enumerate(row)}
    figure, (axis,) = new_axes(title, height=0.75 * len(rows) + 0.8)
    for before, kind in graph.edges:
        arrow = {"arrowstyle": "-|>", "color": "#8C8C8C", "shrinkA": 11, "shrinkB": 15, "linewidth": 0.8}
        axis.annotate("", xy=place[kind], xytext=place[before], arrowprops=arrow)
    for kind, (x, y) in place.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#0072B2"}
        axis.text(x, y, kind.replace(" ", "\n"), ha="center", va="center", fontsize=9, bbox=box)
    axis.set(xlim=(0, 1), ylim=(-len(rows) + 0.5, 0.5))
    axis.axis("off")
    return figure
