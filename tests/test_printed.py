import unicodedata

import pytest
import yaml
from pypdf import PdfReader

from sae_stability import places
from sae_stability.book import printed
from sae_stability.errors import UserError


def test_the_book_is_printed_with_a_bookmark_a_page_and_no_link_into_this_machine(site, browser, tmp_path):
    sheets = printed.printed(site, tmp_path / "book.pdf")
    book = PdfReader(tmp_path / "book.pdf")
    assert len(book.pages) == sheets
    contents = yaml.safe_load((places.root() / "_toc.yml").read_text(encoding="utf-8"))
    assert len(book.outline) == 1 + len(contents["chapters"])
    begins = [book.get_destination_page_number(mark) for mark in book.outline]
    assert begins[0] == 0
    assert begins == sorted(set(begins))
    for mark, page in zip(book.outline, begins, strict=True):
        title = mark.title.partition(". ")[2] or mark.title
        text = unicodedata.normalize("NFKC", book.pages[page].extract_text())  # fi is one sign
        assert "".join(title.split()) in "".join(text.split())
    text = "".join(page.extract_text() for page in book.pages)
    assert "Contents\n" not in text
    assert "How this figure was made" not in text
    assert "Are features crowded?" in text  # what is folded on the page is printed
    links = [str(note.get_object().get("/A", {}).get("/URI", "")) for page in book.pages for note in page.get("/Annots") or ()]
    assert not [link for link in links if link.startswith("file:")]
    figures = sum(path.read_text(encoding="utf-8").count("<figure") for path in site.glob("*.html"))
    assert sum(len(page.images) for page in book.pages) < figures / 4  # the others are vectors


def test_what_is_missing_is_said(site, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="make book"):
        printed.printed(tmp_path, tmp_path / "book.pdf")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install chromium"):
        printed.printed(site, tmp_path / "book.pdf")
    assert not (tmp_path / "book.pdf").exists()
