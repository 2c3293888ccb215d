"""What a figure was drawn by, and from which tables: kept with it, for readers who want the numbers behind a picture."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec
from weakref import WeakKeyDictionary

import pandas as pd
from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Record:
    """How a figure was drawn."""

    function: str
    """With its module."""
    tables: Mapping[str, pd.DataFrame]
    """What it was drawn from, by the names of the function's arguments."""


_RECORDS: WeakKeyDictionary[Figure, Record] = WeakKeyDictionary()


def recorded(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """A function that draws a figure, and keeps the tables that it was given with it."""

    @wraps(draw)
    def drawing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        figure = draw(*args, **kwargs)
        tables: dict[str, pd.DataFrame] = {}
        for name, value in inspect.signature(draw).bind(*args, **kwargs).arguments.items():
            tables |= _tables(name, value)
        _RECORDS[figure] = Record(f"{draw.__module__}.{draw.__qualname__}", tables)
        return figure

    return drawing


def record_of(figure: Figure) -> Record:
    """Raises `KeyError` for a figure of a function that is not `recorded`."""
    return _RECORDS[figure]


def _tables(name: str, value: Any) -> dict[str, pd.DataFrame]:
    """The tables in an argument, flat: no index but numbers, columns with plain names."""
    if isinstance(value, pd.Series):
        value = value.to_frame(value.name or name)
    if isinstance(value, pd.DataFrame):
        held = set(value.index.names) <= set(value.columns)  # of rows that are looked up by columns which they keep
        flat = value.reset_index(drop=isinstance(value.index, pd.RangeIndex) or held)
        return {name: flat.set_axis([_plain(column) for column in flat.columns], axis=1)}
    if isinstance(value, Mapping):
        return {f"{name}-{_plain(key)}": table for key, each in value.items() for table in _tables(name, each).values()}
    return {}


def _plain(name: Any) -> str:
    return " ".join(str(part) for part in name if part != "") if isinstance(name, tuple) else str(name)
