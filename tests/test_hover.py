"""Terms are explained where they first stand on a page."""

import pytest
from docutils import nodes
from docutils.core import publish_doctree

from sae_stability.book import hover
from sae_stability.ledger import CLAIMS

TERMS = {
    "feature": hover.Term("one of many", "glossary", "term-feature"),
    "dead feature": hover.Term("never fires", "glossary", "term-dead"),
    "family": hover.Term("those alike", "glossary", "term-family"),
    "L0": hover.Term("how many fire", "glossary", "term-L0"),
    "C3": hover.Term(CLAIMS["C3"], "function"),
}


def linked(text: str) -> list[tuple[str, str]]:
    page = publish_doctree(text)
    before = page.astext()
    hover.link(page, TERMS, lambda term: f"{term.page}.html#{term.anchor}")
    assert page.astext() == before  # nothing else of the page changes
    return [(each.astext(), each["reftitle"]) for each in page.findall(nodes.reference) if "term" in each["classes"]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A feature, and another feature.", [("feature", "one of many")]),
        ("Features fire.", [("Features", "one of many")]),
        ("Some dead\nfeatures, then a feature.", [("dead\nfeatures", "never fires"), ("feature", "one of many")]),
        ("Families of one family.", [("Families", "those alike")]),
        ("At equal L0, but no l0, XL0 or featureless thing.", [("L0", "how many fire")]),
        ("*A feature*, and C3 of C30.", [("feature", "one of many"), ("C3", CLAIMS["C3"])]),
        ("Words ``feature`` and `feature <https://example.org>`_ are links or code.", []),
        ("A feature\n=========\n\nBut *this* feature is prose.", [("feature", "one of many")]),
        ("======= =======\nfeature family\n======= =======", []),
    ],
)
def test_the_first_use_of_a_term_in_prose_says_what_it_means(text, found):
    assert linked(text) == found


def test_the_glossary_is_read_term_by_term():
    page = publish_doctree("feature\n  One of\n  many.\n\ndead feature\n  Never fires.\n")
    for item in page.findall(nodes.term):
        item["ids"] = [f"term-{item.astext()}"]
    assert hover.glossary(page) == {
        "feature": hover.Term("One of many.", "glossary", "term-feature"),
        "dead feature": hover.Term("Never fires.", "glossary", "term-dead feature"),
    }


def test_every_chapter_explains_terms_and_no_heading_does(site):
    from bs4 import BeautifulSoup

    pages = {path.stem: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.glob("*.html")}
    for name in ("stability", "function", "subspaces", "pooling", "real"):
        terms = pages[name].select("article a.term")
        assert len(terms) >= 5, name
        assert all(term["title"] for term in terms)
        shown = [term["title"] for term in terms]
        assert len(shown) == len(set(shown)), name
    assert not any(page.select(":is(h1, h2, h3, table, pre) a.term") for page in pages.values())
    assert not pages["glossary"].select("a.term")
