"""What chapters call: a study's results, tables and verdicts as text, figures with their alt texts.

book = page.open_study(study)  # the results of a study, computed where they are missing
book.table("cells")            # the main cell's rows of a table
book.claim("C2")               # its line of the ledger
page.say(f"... {page.linked(book, book.row, 'mean_stability', '.0%')} ...")
"""

import html
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import pandas as pd
from matplotlib.figure import Figure

from sae_stability import places
from sae_stability.book import made
from sae_stability.book.numbers import combined as combined
from sae_stability.book.numbers import estimate as estimate
from sae_stability.book.numbers import interval as interval
from sae_stability.book.numbers import line_interval as line_interval
from sae_stability.book.numbers import linked as linked
from sae_stability.book.tables import Tables
from sae_stability.book.tables import open_study as open_study
from sae_stability.book.tables import published as published
from sae_stability.book.tables import short as short
from sae_stability.figures.style import BAND_STYLES
from sae_stability.files import read_json
from sae_stability.ledger import VERDICTS, Line
from sae_stability.matching import BANDS

SIGNS = dict(zip(VERDICTS, "✓<✗~±–", strict=True))
CHAPTERS = {
    **{"C1": "stability", "C2": "function", "C3": "function", "C4": "function", "C5": "triggers", "C6": "triggers"},
    **{"C7": "subspaces", "C8": "synthetic", "C9": "pooling", "C10": "across", "B1": "costs", "B2": "scale"},
}
"""Where a claim or a question is treated; none of those that no chapter treats yet."""
FURTHER_NULLS = {
    "randomised": "the activations of a model whose *weights are shuffled*. That model computes nothing useful, but it does tell "
    "its tokens apart, so there are features to find in it. What comes back there owes nothing to what the model has learned: "
    "where as much comes back as in the model, reappearance alone is no sign that a feature is learned.",
    "whitened": "*whitened* activations, rotated and stretched until their covariance is the identity. No direction has more "
    "variance than another. What comes back there does not need the shape of the covariance.",
    "token-conditional": "*Gaussian data around each token*: the token's mean activation and noise with the covariance that is "
    "left. The only features in it are those of single tokens. What comes back there needs no context.",
}
"""What nulls beside the surrogate are trained on, and what they say."""
MET = {True: "met", False: "failed", None: "open"}
"""What pages call a condition, by whether it is met."""
Column = str | Callable[[pd.Series], str]
"""How a column of a printed table is made of a row: a format string over its columns (`"{l0:.1f}"`), or a function."""


def markdown_table(rows: pd.DataFrame, columns: Mapping[str, Column]) -> str:
    """Rows as a Markdown table; `columns` says under which heading stands what of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for _, row in rows.astype(object).iterrows():  # else a row of numbers alone would turn its counts into floats
        cells = (column(row) if callable(column) else column.format(**row) for column in columns.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def listed(rows: pd.DataFrame, item: str) -> str:
    """Rows in a sentence, each by a format string over its columns, with commas between them."""
    return ", ".join(item.format(**row) for _, row in rows.iterrows())


def benchmarks_file() -> Path:
    return places.root() / "benchmarks" / "results.json"


def benchmarks() -> dict:
    """What `make bench` measured last."""
    return read_json(benchmarks_file())


def show(figure: Figure, name: str, alt: str, caption: str) -> None:
    """Display a figure with its alt text, caption and the name by which pages refer to it; how it was made is kept beside it.

    Its title is what it found, which a fold says that holds it.
    """
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt, "caption": caption, "name": name, "title": figure.get_suptitle()}})
    display({made.KEPT: made.kept(figure, name)}, raw=True)


def say(markdown: str) -> None:
    """Display prose that is filled from results; nothing where there is none."""
    from IPython.display import Markdown, display

    if markdown.strip():
        display(Markdown(markdown))


def show_html(text: str) -> None:
    """Display HTML, such as the gallery."""
    from IPython.display import HTML, display

    display(HTML(text))


def box(title: str, text: str) -> None:
    """Display a short aside, beside the line of argument; `text` is HTML."""
    show_html(f'<div class="admonition note"><p class="admonition-title">{title}</p><p>{text}</p></div>')


def labelled_explanations() -> pd.DataFrame:
    """Explanations that are labelled as of surface form or not. Columns: text, surface, source."""
    return pd.read_csv(places.published() / "explanations" / "labels.csv")


def simulated_coverage() -> pd.DataFrame:
    """How often intervals hold what they should in simulated studies. Columns: those of `sae_stability.simulation.coverage`."""
    return pd.DataFrame(read_json(places.published() / "intervals" / "intervals.json")["rows"])


def rows(name: str) -> pd.DataFrame | None:
    """A published table of no study; None where it is not published.

    `worlds/worlds`: what was found of worlds with known features, those of the phase diagram, one row a world of each slice.
    `worlds/latents`: the unstable latents of the reverse test, one row each (`diagnostics.all_unstable_latents`). `worlds/pools`:
    what pools of seeds find (`recovery.pooled`). `costs/jobs`: what stages of studies took (`costs.measured`).
    """
    path = places.published() / f"{name}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def rows_made(name: str) -> str:
    """Where that comes from, in a sentence."""
    made = read_json(places.published() / f"{name}.json")
    return (
        f"Published with the book: {made['rows']:,} {name.rpartition('/')[2]}, which `{made['command']}` made at commit "
        f"`{short(made['commit'])}` in {made['seconds'] / 60:.0f} minutes."
    )


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table: nothing in it is markup."""
    shown = re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", text.replace("\n", "↵"))
    return f"<code>{shown}</code>"


def scoreboard(ledgers: Mapping[str, list[dict]]) -> str:
    """The ledgers of some cells as a table, each under its heading: what is claimed, with a link to its chapter, and the verdict of
    each line with the statistic behind it."""

    def judgements(row: pd.Series, lines: list[dict]) -> str:
        return "<br>".join(_judgement(line) for line in lines if line["id"] == row["id"])

    def linked(row: pd.Series) -> str:
        return f"{{doc}}`{row['id']} <{CHAPTERS[row['id']]}>`" if row["id"] in CHAPTERS else row["id"]

    claims = pd.DataFrame(line for lines in ledgers.values() for line in lines).drop_duplicates("id")
    columns: dict[str, Column] = {"": linked, "claim or question": "{claim}"}
    columns |= {heading: partial(judgements, lines=lines) for heading, lines in ledgers.items()}
    return markdown_table(claims, columns)


def _judgement(line: dict) -> str:
    if line["verdict"] == "not tested":
        measured = line["id"] in CHAPTERS and line["id"].startswith("B")  # a question asks how much, and no verdict answers that
        return f"{SIGNS['not tested']} {'measured, on its page' if measured else 'not tested'}"
    return f"{SIGNS[line['verdict']]} {line['line']}: **{line['verdict']}**, {line_interval(line, '.2f')}{_decided(line)}"


def _decided(line: dict) -> str:
    """By which conditions a line is not supported, where the number that stands beside the verdict does not say it."""
    if line["verdict"] in ("supported", "not tested"):
        return ""
    conditions = line.get("conditions", [])
    deciding = [part for part in conditions if part["met"] is False] or [part for part in conditions if part["met"] is None]
    if not deciding or any(part["value"] == line["value"] for part in deciding):
        return ""
    return f"; by *{deciding[0]['what']}*, {line_interval(deciding[0], '.2f')}"


def rules(lines: list[dict]) -> str:
    """What is asked of each claim that is tested, in words, line by line."""
    tested = (line for line in lines if line["rule"])
    return "\n\n".join(
        f"**{line['id']}, {line['line']}.** The statistic is the {line['statistic']}; the verdict is {line['rule']}."
        for line in tested
    )


def judged(lines: list[dict]) -> str:
    """The verdicts of the lines of a claim, each with its conditions, as Markdown. A page of its own spells every rule out."""
    if "conditions" not in lines[0]:
        return f"**{lines[0]['id']} is not tested** in this study."
    columns: dict[str, Column] = {
        "condition": "{what}",
        "value, 95 % interval": line_interval,
        "bound": lambda part: f"{'below' if part['below'] else 'above'} {part['bound']:g}",
        " ": lambda part: MET[part["met"]],
    }
    return "\n\n".join(
        f"**{line['id']}, {line['line']}: {line['verdict']}**, {line['scope']}.\n\n"
        + markdown_table(pd.DataFrame(line["conditions"]), columns)
        for line in lines
    )


def by_line(study: Tables, claims: list[str]) -> str:
    """The verdicts of some claims on every cell of the grid: a column a line, each with its statistic."""

    headings = {f"{claim} {line}": (claim, line) for claim in claims for line in get_args(Line)}
    columns = {heading: partial(_verdict_of, study, claim=claim, line=line) for heading, (claim, line) in headings.items()}
    return grid_table(study, columns)


def every_cell(study: Tables, claim: str, table: str = "cells") -> str:
    """The verdicts of a claim on every cell that a table of a study has, the main one too; a sentence where the study did not ask
    for it."""
    cells = study.named(study.table(table, every_cell=True).drop_duplicates("cell"))
    tested = cells[[len(study.claims(claim, cell)) == len(get_args(Line)) for cell in cells["cell"]]]
    if tested.empty:
        return f"The study `{study.study.name}` was not asked about {claim}; `sae-stability run {study.study.name}` asks it."

    lines = {line: partial(_verdict_of, study, claim=claim, line=line) for line in get_args(Line)}
    columns: dict[str, Column] = {"cell": "{name}", **lines}
    return f"**{claim} in the study `{study.study.name}`.** {study.origin}\n\n" + markdown_table(tested, columns)


def _verdict_of(study: Tables, row: pd.Series, claim: str, line: str) -> str:
    """The verdict of a line of a claim on the cell of a row, with its statistic."""
    judged = study.claim(claim, row["cell"], line)
    return f"{judged['verdict']}: {line_interval(judged, '.2f')}{_decided(judged)}"


def grid_table(study: Tables, columns: Mapping[str, Column]) -> str:
    """A table of the cells of the grid, each by what tells it from the others."""
    rows = study.others()
    if rows.empty:
        return "This study has one cell; `grid: {variant: [relu, gated]}` in its file adds others."
    note = "" if rows["cell_on_target"].all() else "\n\nA dagger marks a cell that misses its L0."
    return markdown_table(rows, {"cell": "{name}", **columns}) + note


def gallery(examples: pd.DataFrame) -> str:
    """Example features of each band as HTML: the stronger a token fires its feature, the darker its mark."""
    parts = []
    for band in BANDS:
        chosen = examples[examples["band"] == band]
        parts += [f"<h4>{band}</h4>", *(_feature(part) for _, part in chosen.groupby("feature"))]
    return f'<div class="gallery">{"".join(parts)}</div>'


def _feature(tokens: pd.DataFrame) -> str:
    first, strongest = tokens.iloc[0], tokens["activation"].max()
    lines = []
    for _, context in tokens.groupby("rank"):
        spans = []
        for token, activation in zip(context["token"], context["activation"], strict=True):
            text = html.escape(token).replace("\n", "↵")
            style = f"--strength: {activation / strongest:.0%}"  # book.css has the colours of either theme
            spans.append(f'<mark style="{style}">{text}</mark>' if activation > 0 else text)
        lines.append(f"<code>{''.join(spans)}</code>")
    told = (
        f"Feature {first['feature']} comes back in {first['matches']} of {first['trials']} other seeds "
        f"and fires on {first['frequency']:.2%} of the tokens"
    )
    told += f"; trigger: {first['trigger']}" if "trigger" in first else ""
    return f'<div class="bar" style="border-color: {BAND_STYLES[first["band"]].colour}"><p>{told}</p>{"".join(lines)}</div>'
