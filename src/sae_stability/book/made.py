"""How each figure was made, told below it: its function, its data as CSV and Parquet, the picture itself, and the study behind it.

`page.show` keeps all that in the output of its cell; where the book is built it becomes files and links.
"""

import base64
import hashlib
import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
from matplotlib.figure import Figure

from sae_stability.figures.record import record_of

KEPT = "application/vnd.sae-stability.figure+json"
FOLDER = "_static/figures"
LARGEST = 1_000_000
"""Characters of an SVG, beyond which a figure of many points is kept as PNG alone."""


def kept(figure: Figure, name: str) -> dict[str, Any]:
    """What an executed notebook keeps of a figure beside its picture, as JSON."""
    record, picture = record_of(figure), io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = picture.getvalue()
    tables = {of: _packed(table) for of, table in record.tables.items()}
    return {"name": name, "function": record.function, "tables": tables, "svg": svg if len(svg) <= LARGEST else None}


def told(notebook: nbformat.NotebookNode, stage: Path, study: str, commit: str) -> nbformat.NotebookNode:
    """An executed notebook in which a fold below each figure says how it was made; its files are written into `stage`."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        for output in [output for output in cell.get("outputs", []) if KEPT in output.get("data", {})]:
            cell.outputs.remove(output)
            (picture,) = (each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", {}))
            cells.append(nbformat.v4.new_markdown_cell(_fold(output.data[KEPT], picture, stage, study, commit)))
    return nbformat.from_dict({**notebook, "cells": cells})


def _fold(made: dict, picture: str, stage: Path, study: str, commit: str) -> str:
    """The fold as HTML; its files are written."""
    folder, name, data = stage / FOLDER, made["name"], []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(base64.b64decode(picture))
    pictures = [_link(f"{name}.png", "PNG")]
    if made["svg"] is not None:
        (folder / f"{name}.svg").write_text(made["svg"], encoding="utf-8")
        pictures.append(_link(f"{name}.svg", "SVG"))
    for of, packed in made["tables"].items():
        content = base64.b64decode(packed)  # many figures are drawn from one table, which stands here once
        file = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', of)}-{hashlib.sha256(content).hexdigest()[:8]}"
        (folder / f"{file}.parquet").write_bytes(content)
        table = pd.read_parquet(folder / f"{file}.parquet")
        table.to_csv(folder / f"{file}.csv", index=False, float_format="%.9g")
        links = f"{_link(f'{file}.csv', 'CSV')} or {_link(f'{file}.parquet', 'Parquet')}"
        data.append(f"<code>{html.escape(of)}</code> ({len(table):,} rows: {links})")
    drawn_from = f" from {', '.join(data)}" if data else ""
    return (
        '<details class="made"><summary>How this figure was made</summary>'
        f"<p>Drawn by <code>{made['function']}</code>{drawn_from}. The picture: {', '.join(pictures)}. "
        f"This page was computed for the study <code>{study}</code> at commit <code>{commit}</code>; "
        f"<code>sae-stability run {study}</code> computes it again.</p></details>"
    )


def _link(file: str, words: str) -> str:
    return f'<a href="{FOLDER}/{file}" download>{words}</a>'


def _packed(table: pd.DataFrame) -> str:
    """A table as Parquet, in text. What is neither a number nor text goes as text."""
    plain = {name: table[name] if _is_plain(table[name]) else table[name].map("{}".format) for name in table}
    packed = io.BytesIO()
    pd.DataFrame(plain).to_parquet(packed, index=False)
    return base64.b64encode(packed.getvalue()).decode()


def _is_plain(column: pd.Series) -> bool:
    return not pd.api.types.is_object_dtype(column) or column.map(lambda value: value is None or isinstance(value, str)).all()
