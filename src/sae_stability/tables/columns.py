"""Columns that tables have in common."""

from sae_stability.statistics import Interval


def interval_columns(name: str, interval: Interval) -> dict[str, float]:
    """An estimate and the ends of its interval as three columns."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
