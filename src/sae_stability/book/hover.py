"""What words mean, where they stand: a Sphinx extension that links the first use of a term on each page to the glossary.

The link's title is the definition, which browsers show under the pointer, and `book.css` under the focus of a keyboard. Claims are
words, too: C3 says what it claims.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from docutils import nodes
from sphinx.application import Sphinx

from sae_stability.book.page import CHAPTERS
from sae_stability.ledger import CLAIMS

GLOSSARY = "glossary"
NOT_HERE = (nodes.title, nodes.reference, nodes.literal, nodes.math, nodes.table)
"""What is no prose, or says already where it leads."""


@dataclass(frozen=True)
class Term:
    """What a word means, and where that is said at length."""

    meaning: str
    page: str
    anchor: str = ""


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("doctree-resolved", _explain)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _explain(app: Sphinx, page: nodes.document, name: str) -> None:
    if name == GLOSSARY or GLOSSARY not in app.env.found_docs:
        return
    terms = claims() | glossary(app.env.get_doctree(GLOSSARY))
    elsewhere = {word: term for word, term in terms.items() if term.page != name}
    link(page, elsewhere, lambda term: app.builder.get_relative_uri(name, term.page) + (f"#{term.anchor}" if term.anchor else ""))


def glossary(page: nodes.document) -> dict[str, Term]:
    """The terms of the glossary by their words."""
    found: dict[str, Term] = {}
    for item in page.findall(nodes.definition_list_item):
        meaning = " ".join(item[-1].astext().split())
        found |= {term.astext(): Term(meaning, GLOSSARY, term["ids"][0]) for term in item.findall(nodes.term)}
    return found


def claims() -> dict[str, Term]:
    """The claims by their names, each with the chapter that treats it."""
    return {name: Term(claim, CHAPTERS[name]) for name, claim in CLAIMS.items() if name in CHAPTERS}


def link(page: nodes.document, terms: dict[str, Term], uri: Callable[[Term], str]) -> None:
    """Make the first use of each term in the prose of a page a link to `uri(term)` with its meaning as title."""
    left = dict(terms)
    for text in list(prose(page)):
        if not left:
            return
        pieces, told = [], 0
        for match in words(left).finditer(text):
            word = named(match[0], left)
            if word is None:  # used already in this text
                continue
            term = left.pop(word)
            shown = nodes.reference("", match[0], refuri=uri(term), internal=True, reftitle=term.meaning, classes=["term"])
            pieces += [nodes.Text(text[told : match.start()]), shown]
            told = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[told:])])


def prose(page: nodes.document) -> Iterator[nodes.Text]:
    """The pieces of text of paragraphs outside of headings, links, code, formulas and tables."""
    for paragraph in page.findall(nodes.paragraph):
        for text in paragraph.findall(nodes.Text):
            if not any(isinstance(each, NOT_HERE) for each in _above(text)):
                yield text


def _above(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def words(terms: dict[str, Term]) -> re.Pattern:
    """Any of the terms, the longest first, over line breaks, as singular or plural, at the beginning of a sentence too."""
    return re.compile("|".join(rf"\b{_spelled(term)}\b" for term in sorted(terms, key=len, reverse=True)))


def named(found: str, terms: dict[str, Term]) -> str | None:
    """Which of the terms that is."""
    return next((term for term in terms if re.fullmatch(_spelled(term), found)), None)


def _spelled(term: str) -> str:
    first, rest = term[0], term[1:]
    start = f"[{first.lower()}{first.upper()}]" if rest.islower() else re.escape(first)
    plural = re.escape(rest[:-1]) + "(?:y|ies)" if rest.endswith("y") else re.escape(rest) + "s?"
    return start + plural.replace(r"\ ", r"\s+")
