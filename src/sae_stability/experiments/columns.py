"""Columns that tables have in common."""

import pandas as pd

from sae_stability.statistics import Interval


def interval_columns(name: str, interval: Interval) -> dict[str, float]:
    """An estimate and the ends of its interval as three columns."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def each_kind(kinds: list[str], table) -> pd.DataFrame:
    """A table's rows for the ensemble and each of its nulls, told apart by the column `kind`."""
    parts = [table(kind) for kind in kinds]
    for kind, part in zip(kinds, parts, strict=True):
        part.insert(0, "kind", kind)
    return pd.concat(parts, ignore_index=True)
