"""Numbers as pages print them; those that stand in a row of a table, or in a line of a ledger, as links to a page that says where,
and so those that combine several rows.

A link holds what the table has. Where the book is built, the page *Numbers* lists all of them.
"""

import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from jaxtyping import Int

from sae_stability.book.tables import Tables

PAGE = "numbers"
LINK = re.compile(r'<a class="number" href="[^"]*" data-row="([^"]*)"[^>]*>([^<]*)</a>')
HEADINGS = ("as printed", "value", "interval", "where it stands")
COMBINED: dict[str, Callable[[pd.Series], float]] = {
    "mean": pd.Series.mean,
    "sum": pd.Series.sum,
    "range": lambda values: values.max() - values.min(),
    "first less last": lambda values: values.iloc[0] - values.iloc[-1],
    "last less first": lambda values: values.iloc[-1] - values.iloc[0],
}
"""How a number is made of those in several rows of a column."""


def interval(row: Mapping, name: str, spec: str = ".3f") -> str:
    """An estimate and its interval, from the columns NAME, NAME_low and NAME_high of a row; alone where it has none."""
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return _interval(value, low, high, spec)


def line_interval(line: Mapping, spec: str = ".3f") -> str:
    """The same of a line of the ledger, or of one of its conditions: as a link, where it is known in which ledger it stands."""
    printed = _interval(line["value"], line["ci_low"], line["ci_high"], spec)
    if "stands" not in line or pd.isna(line["value"]):
        return printed
    ends = [line["ci_low"], line["ci_high"]]
    values = [line["value"], *(() if pd.isna(ends).any() else ends)]
    return _link({**line["stands"], "column": "value", "values": values}, printed)


def estimate(value: float | None, spec: str = ".3f", missing: str = "not defined") -> str:
    """An estimate alone. What has no value, such as the mean of an empty band, is not defined."""
    return missing if value is None or math.isnan(value) else f"{value:{spec}}"


def _interval(value: float | None, low: float | None, high: float | None, spec: str) -> str:
    ends = "" if low is None or math.isnan(low) else f" [{low:{spec}}, {high:{spec}}]"
    return estimate(value, spec) + ends


def linked(study: Tables, row: pd.Series, name: str, spec: str = ".3f") -> str:
    """A number of a row of `study.table`, with its interval where it has one, as a link to the row (HTML, for prose). There is no
    link where it is not defined, and where several rows of the table are like this one.

    Raises `ValueError` for a row of no table, and for one that was changed since.
    """
    ends = [f"{name}_low", f"{name}_high"]
    ends = ends if all(pd.notna(row.get(end)) for end in ends) else []
    printed = interval(row, name, spec) if ends else estimate(row[name], spec)
    table, found = _found(study, row.to_frame().T, row.attrs, name)
    told = _told_apart(table, found, (name, *ends))
    if pd.isna(row[name]) or len(found) > 1 or told is None:
        return printed
    return _link({**_column(study, table, name), "row": told, "values": [_plain(row[column]) for column in (name, *ends)]}, printed)


def combined(study: Tables, rows: pd.DataFrame, name: str, how: str, spec: str = ".3f") -> str:
    """A number made of several rows of `study.table`, in their order there and in one of the ways of `COMBINED`, as a link that
    says which rows and how (HTML, for prose). There is no link where it is not defined, and where other rows are like these.

    Raises `ValueError` for rows of no table, and for some that were changed since.
    """
    table, found = _found(study, rows, rows.attrs, name)
    value = float(COMBINED[how](table[name].iloc[found])) if len(rows) else math.nan
    told = _told_apart(table, found, (name,))
    if math.isnan(value) or len(found) > len(rows) or told is None:
        return estimate(value, spec)
    return _link({**_column(study, table, name), "row": told, "how": how, "values": [value]}, estimate(value, spec))


def _found(study: Tables, rows: pd.DataFrame, attrs: Mapping, name: str) -> tuple[pd.DataFrame, Int[np.ndarray, "row"]]:
    """The table that rows are of, with every cell, and where in it rows like them stand."""
    if "table" not in attrs:
        raise ValueError(f"{name}: a row of no table; take it from what study.table gives")
    table = study.table(attrs["table"], every_cell=True)
    same = np.zeros(len(table), dtype=bool)
    for _, row in rows.iterrows():
        held = table[[column for column in row.index if column in table]]
        like = (held.eq(row[held.columns]) | (held.isna() & row[held.columns].isna())).all(axis=1)
        if name not in held or not like.any():
            raise ValueError(f"{name}: no row of the table {attrs['table']} of {study.study.name} is like that")
        same |= like.to_numpy()
    return table, np.flatnonzero(same)


def _column(study: Tables, table: pd.DataFrame, name: str) -> dict[str, str]:
    return {"table": f"{study.place}/{table.attrs['table']}.parquet", "column": name}


def _link(cited: Mapping, printed: str) -> str:
    data = html.escape(json.dumps(cited))
    title = html.escape(_where(cited))
    return f'<a class="number" href="{PAGE}.html#{_anchor(cited)}" data-row="{data}" title="{title}">{printed}</a>'


def _where(cited: Mapping) -> str:
    how = f"{cited['how']} of " if "how" in cited else ""
    return f"{how}{cited['column']} in {cited['table']}"


def _told_apart(table: pd.DataFrame, positions: Int[np.ndarray, "row"], cited: Iterable[str]) -> dict | None:
    """What tells rows from the others: their cell, and each other column that leaves fewer rows; those in which they are alike
    first, and those of no measurements. Where they are not alike, a list. None where that leaves others, too."""
    chosen, left, told = table.iloc[positions], table, {}
    measured = {name for name in table if pd.api.types.is_float_dtype(table[name])}
    alike = {name for name in table if chosen[name].nunique(dropna=False) == 1}
    for column in sorted(table.columns, key=lambda name: (name not in alike, name in measured)):
        values = list(chosen[column].drop_duplicates())
        among = left[left[column].isin(values)]
        fewer = len(among) < len(left) and column not in measured & set(cited)
        if fewer or (column == "cell" and column in alike):
            left = among
            told[column] = _plain(values[0]) if column in alike else [_plain(value) for value in values]
    return told if len(left) == len(chosen) else None


def _plain(value):
    """As JSON takes it: no number of numpy, and None for what is missing."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _anchor(cited: Mapping) -> str:
    place = json.dumps([cited["table"], cited["row"], cited["column"], *([cited["how"]] if "how" in cited else [])])
    return f"{cited['column']}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def page(preface: str, chapters: Mapping[str, nbformat.NotebookNode]) -> str:
    """The page of all numbers that executed chapters link, as Markdown: under each chapter's title its numbers."""
    parts, seen = [preface], set[str]()
    for name, notebook in chapters.items():
        rows = []
        for data, printed in _links(notebook):
            cited = json.loads(html.unescape(data))
            if _anchor(cited) not in seen:
                seen.add(_anchor(cited))
                rows.append(_row(cited, printed, name))
        if rows:
            head, body = "".join(f"<th>{heading}</th>" for heading in HEADINGS), "\n".join(rows)
            table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
            parts.append(f"## {_title(notebook)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _links(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What the prose of an executed notebook links: each as what the table has, and as it is printed."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return [found for output in outputs for found in LINK.findall(output.get("data", {}).get("text/markdown", ""))]


def _title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.partition("\n")[0].lstrip("# ")


def _row(cited: Mapping, printed: str, chapter: str) -> str:
    value, *ends = (f"{each:,}" if isinstance(each, int) else f"{each:.6g}" for each in cited["values"])
    told = (
        f"{column} {' and '.join(map(_quoted, each if isinstance(each, list) else [each]))}"
        for column, each in cited["row"].items()
    )
    where = f"{_where(cited)}: {', '.join(told) or 'every row'}"
    shown = [f'<a href="{chapter}.html">{printed}</a>', value, " to ".join(ends), html.escape(where).replace("/", "/<wbr>")]
    return f'<tr id="{_anchor(cited)}">' + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>"


def _quoted(value: object) -> str:
    """As it stands among others: in quotes where it holds a comma itself."""
    return f'"{value}"' if "," in str(value) else str(value)


def write(stage: Path, chapters: Mapping[str, nbformat.NotebookNode]) -> None:
    """Complete the page among the sources of a book."""
    path = stage / f"{PAGE}.md"
    path.write_text(page(path.read_text(encoding="utf-8"), chapters), encoding="utf-8")
