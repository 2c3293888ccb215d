"""The whole book as one PDF (`make pdf`): Chromium prints the pages of the built book, which are joined with a bookmark each."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_stability.book.build import site_folder
from sae_stability.errors import UserError
from sae_stability.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
UNLINK = """() => document.querySelectorAll("a[href]").forEach((link) => {
  if (link.protocol === "file:" && link.pathname !== location.pathname) link.removeAttribute("href");
})"""
"""Links to other pages lead nowhere from a PDF, and would tell where the book was built."""
ALL_THAT_IS_FOLDED = "() => document.querySelectorAll('details:not(.made, .hide)').forEach((fold) => fold.open = true)"
IS_SET = "() => window.MathJax?.startup.promise.then(() => true)"
"""Waits until the formulas of a page that is loaded are set."""
MARGIN, SCALE = "1.8cm", 0.8


def printed(site: Path, into: Path) -> int:
    """Print a built book into a file, page after page as its table of contents has them; how many sheets there are.

    Raises `UserError` where there is no book or no browser.
    """
    from playwright.sync_api import sync_playwright
    from pypdf import PdfWriter

    if not (site / "index.html").is_file():
        raise UserError(f"{site} holds no book; make book builds it")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"no {BROWSERS[0]} on this machine, which prints the pages; apt-get install {BROWSERS[0]}")
    book = PdfWriter()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(device_scale_factor=2)  # as screens on which figures are vectors
        page.emulate_media(media="print", color_scheme="light")
        for address in tqdm(_pages(page, site), "printing", unit="page", disable=None):
            page.goto(address)
            page.evaluate(IS_SET)
            page.evaluate(ALL_THAT_IS_FOLDED)
            page.evaluate(UNLINK)
            margin: Any = dict.fromkeys(("top", "bottom", "left", "right"), MARGIN)
            sheets = page.pdf(format="A4", print_background=True, margin=margin, scale=SCALE)
            book.append(io.BytesIO(sheets), outline_item=page.title().partition(" — ")[0])
    book.add_metadata({"/Title": "Seed dependence in sparse autoencoders"})
    with replacing(into) as temporary:
        book.write(temporary)
    return len(book.pages)


def _pages(page, site: Path) -> list[str]:
    """The addresses of the book's pages, in the order of its table of contents."""
    page.goto((site / "index.html").as_uri())
    listed = page.locator("nav .toctree-l1 > a").evaluate_all("links => links.map((link) => link.href)")
    return list(dict.fromkeys([(site / "index.html").as_uri(), *(address.partition("#")[0] for address in listed)]))


def main() -> None:
    into = site_folder().parent / "book.pdf"
    try:
        sheets = printed(site_folder(), into)
    except UserError as error:
        print(f"sae-stability: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{into}: {sheets} pages")


if __name__ == "__main__":
    main()
