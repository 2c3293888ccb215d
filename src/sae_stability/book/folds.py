"""Details that fold away: a Sphinx extension, and what prepares notebooks for it.

Where a chapter says `<!-- fold: WORDS -->`, which no notebook shows, the rest of that section folds away on its page. The line that
unfolds it states the finding, which is the title of the first figure behind it; or, where there is none, WORDS.
"""

import html
import re
from itertools import takewhile

import nbformat
from docutils import nodes
from sphinx.application import Sphinx

MARK = re.compile(r"^<!-- fold: (?P<words>.+) -->$", re.MULTILINE)
HEADING = re.compile(r"^#+ ", re.MULTILINE)
BEGINS = "fold: "
"""How a comment in the document tree begins that says where a fold does."""


def told(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook whose marks say what each fold has found; none is left where there is nothing to fold."""
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (mark := MARK.search(cell.source)):
            before, within = cell.source[: mark.start()], cell.source[mark.end() :]
            behind = list(takewhile(lambda other: not _begins_section(other), notebook.cells[position + 1 :]))
            outputs = [output for other in behind for output in other.get("outputs", [])]
            holds = outputs or within.strip() or any(other.cell_type == "markdown" for other in behind)
            cell.source = f"{before}% {BEGINS}{_finding(outputs) or mark['words']}{within}" if holds else before
    return notebook


def _begins_section(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "markdown" and HEADING.search(cell.source) is not None


def _finding(outputs: list[nbformat.NotebookNode]) -> str | None:
    """The title of the first figure."""
    titles = (output.get("metadata", {}).get("image/png", {}).get("title") for output in outputs)
    return next((" ".join(title.split()) for title in titles if title), None)


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("doctree-resolved", lambda app, page, name: fold(page))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fold(page: nodes.document) -> None:
    """Fold what stands behind each mark, up to the end of its section."""
    for mark in list(page.findall(nodes.comment)):
        if mark.astext().startswith(BEGINS):
            section, at = mark.parent, mark.parent.index(mark)
            inside = section[at + 1 :]
            opens = f'<details class="more"><summary>{html.escape(mark.astext().removeprefix(BEGINS))}</summary>'
            folded = [nodes.raw("", opens, format="html"), *inside, nodes.raw("", "</details>", format="html")]
            del section[at:]
            section += folded if inside else []
