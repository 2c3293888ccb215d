"""Whether features that match by direction fire on the same tokens."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import recorded
from sae_stability.figures.style import KINDS, legend_below, new_axes

FEWEST = 5  # features that a bin needs to be drawn


@recorded
def correlation_by_cosine(features: pd.DataFrame, threshold: float, title: str) -> Figure:
    """Correlation of activations against the cosine of directions: median and middle half. Columns: kind, cosine, correlation."""
    figure, (axis,) = new_axes(title)
    edges = np.linspace(threshold, 1, 11)
    for kind, part in features.groupby("kind", sort=False):
        bins = pd.cut(part["cosine"], edges, include_lowest=True, labels=False)
        quartiles = part["correlation"].groupby(bins).quantile([0.25, 0.5, 0.75]).unstack()
        quartiles = quartiles[part["correlation"].groupby(bins).size() >= FEWEST]
        centres = (edges[:-1] + edges[1:])[quartiles.index.astype(int)] / 2
        style = KINDS[kind]
        axis.plot(centres, quartiles[0.5], color=style.colour, linestyle=style.line, marker="o", label=style.name)
        axis.fill_between(centres, quartiles[0.25], quartiles[0.75], color=style.colour, alpha=0.2, linewidth=0)
    axis.axline((threshold, threshold), (1, 1), color="black", linewidth=1, linestyle=":", label="as alike in both")
    axis.set(xlabel="cosine of the directions", ylabel="correlation of the activations", xlim=(threshold, 1), ylim=(-0.05, 1.02))
    legend_below(figure, axis, columns=3)
    return figure
