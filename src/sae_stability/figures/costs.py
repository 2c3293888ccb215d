"""What stages of studies take, beside what was expected of them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.style import MARKERS, legend_below, new_axes, series_style


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
    axis.set(xlabel="seconds that a stage took", ylabel="seconds expected from the others of its kind")
    legend_below(figure, axis, columns=3)
    return figure
