"""Figures, one function each. They know tables and arrays only, and return the Figure."""

from sae_stability.figures.function import (
    ORDER_STYLES,
    asymmetry,
    cumulative,
    fates,
    impact_scatter,
    orders_check,
    overlap,
    transplants,
)
from sae_stability.figures.stability import (
    against_frequency,
    against_nulls,
    by_seeds,
    criteria,
    family_sizes,
    growth,
    neighbours,
    stability_histogram,
    thresholds,
    unique_families,
    variant_histograms,
)
from sae_stability.figures.style import BAND_MARKERS, COLOURS, DASHES, NAMES
from sae_stability.figures.training import frequencies, step_times, training_curves, variant_curves
from sae_stability.figures.triggers import QUANTITIES, deltas, token_tells, trigger_classes

__all__ = [
    "BAND_MARKERS",
    "COLOURS",
    "DASHES",
    "NAMES",
    "ORDER_STYLES",
    "QUANTITIES",
    "against_frequency",
    "against_nulls",
    "asymmetry",
    "by_seeds",
    "criteria",
    "cumulative",
    "deltas",
    "family_sizes",
    "fates",
    "frequencies",
    "growth",
    "impact_scatter",
    "neighbours",
    "orders_check",
    "overlap",
    "stability_histogram",
    "step_times",
    "thresholds",
    "token_tells",
    "training_curves",
    "transplants",
    "trigger_classes",
    "unique_families",
    "variant_curves",
    "variant_histograms",
]
