import base64
import io
import os
import re
import threading
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_stability import places
from sae_stability.book import build, printed
from sae_stability.loading import load_study
from sae_stability.store import Store

HEAVIEST = 2_000_000  # bytes of a page with all that it loads, unpacked
UNFOLD = "document.querySelectorAll('details.more').forEach((fold) => (fold.open = true))"


@pytest.mark.parametrize(
    ("width", "theme", "rules"),
    [(1200, "light", {}), (390, "dark", {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}})],
)
def test_every_page_opens_without_a_fault_and_keeps_no_reader_out(site, address, chromium, width, theme, rules):
    """Each page is loaded wide in the light theme and on a phone in the dark one, where axe-core asks what a theme can change."""
    from axe_playwright_python.sync_playwright import Axe

    faults, loaded, weights, pages = [], set(), {}, sorted(path.name for path in site.glob("*.html"))
    assert {"index.html", "setup.html", "stability.html", "costs.html"} <= set(pages)

    def requested(request) -> None:
        url = urlsplit(request.url)
        if url.netloc == urlsplit(address).netloc:
            loaded.add(site / url.path[1:])
        elif url.scheme not in ("data", "blob"):
            faults.append(request.url)

    page = chromium.new_page(viewport={"width": width, "height": 844})
    page.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("response", lambda response: faults.append(f"{response.status}: {response.url}") if response.status >= 400 else None)
    page.on("request", requested)
    for name in pages:
        loaded.clear()
        page.goto(f"{address}/{name}")
        page.evaluate(printed.IS_SET)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        for image in page.locator("article img").all():
            alt = image.get_attribute("alt") or ""
            if len(alt) < 40 or re.search(r"\.(png|svg|jpe?g)$", alt):
                faults.append(f"{name}: alt text {alt!r}")
            if image.evaluate("image => image.naturalWidth") == 0:
                faults.append(f"{name}: an empty image")
        page.evaluate(UNFOLD)
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if overflow > 1:
            faults.append(f"{name}: wider than the screen by {overflow}")
        for equation in page.locator("mjx-container[display=true]").all():
            if equation.evaluate("box => box.scrollWidth > box.clientWidth + 1"):
                faults.append(f"{name}: an equation is cut off: {equation.inner_text()!r}")
        if name == "explorer.html":
            page.locator("#explorer tbody a").first.click()
            page.wait_for_selector("#explorer .partner code")
        page.set_viewport_size({"width": 1200, "height": 844})  # on a phone what stands at the sides of a page is hidden
        asked = {"preload": False, "resultTypes": ["violations"]}
        for found in Axe().run(page, options=asked | rules).response["violations"]:
            if found["impact"] in ("serious", "critical"):
                where = [node["html"][:120] for node in found["nodes"][:3]]
                faults.append(f"{name}: {found['id']} in {len(found['nodes'])} places, {where}")
        page.set_viewport_size({"width": width, "height": 844})
        weights[name] = sum(file.stat().st_size for file in loaded if file.is_file())
    faults += [f"{name}: {weight / 1e6:.2f} MB" for name, weight in weights.items() if weight > HEAVIEST]
    assert max(weights.values()) > HEAVIEST / 2
    page.goto(f"{address}/search.html?q=surrogate", wait_until="networkidle")
    assert page.locator("#search-results li a").count() >= 5
    assert page.goto(f"{address}/stability.html", wait_until="networkidle")
    assert page.locator("article img").count() >= 5
    assert page.locator(".MathJax, mjx-container").count() > 0
    assert not faults


def test_details_are_folded_until_a_link_leads_into_them_or_they_are_printed(site, address, chromium):
    page = chromium.new_page(viewport={"width": 1200, "height": 844})
    page.goto(f"{address}/stability.html", wait_until="networkidle")
    folds, opened = page.locator("article details.more"), page.locator("article details.more[open]")
    assert folds.count() >= 5
    assert opened.count() == 0
    assert all(len(told) > 10 for told in folds.locator("> summary").all_inner_texts())
    crowded = page.locator("#are-features-crowded > h3")
    assert not crowded.is_visible()
    page.evaluate("location.hash = 'are-features-crowded'")
    crowded.wait_for(state="visible")
    assert opened.count() == 1
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.count() == folds.count()


def test_below_every_figure_stands_how_it_was_made(site, quick):
    linked = set()
    for path in site.glob("*.html"):
        page = path.read_text(encoding="utf-8")
        folds = re.findall(r'<details class="made">.*?</details>', page, re.S)
        assert len(folds) == page.count("<figcaption>"), path.name
        for fold in folds:
            assert "sae-stability run quick" in fold
            for rows, csv, parquet in re.findall(r'\(([\d,]+) rows: <a href="([^"]+)"[^>]*>CSV</a> or <a href="([^"]+)"', fold):
                counts = {len(pd.read_csv(site / csv)), len(pd.read_parquet(site / parquet))}
                assert counts == {int(rows.replace(",", ""))}
            linked |= set(re.findall(r'href="([^"]+)"', fold))
    assert all((site / file).stat().st_size > 0 for file in linked)
    assert len(linked) > 60


def test_keys_of_chapters_are_made_in_one_thread(quick, site, monkeypatch):
    made, key_of_chapter = [], build.chapter_key
    monkeypatch.setattr(build, "chapter_key", lambda *about: made.append(threading.get_ident()) or key_of_chapter(*about))
    build.execute(quick.study)
    assert made == [threading.get_ident()] * len(build.chapters())


def test_chapters_read_the_results_of_whoever_asks_for_them(tmp_path, monkeypatch):
    """Kernels work in another folder than the command, from which a relative path would lead elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_STABILITY_RESULTS", "out")
    told = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: told.update(os.environ))
    build._papermill(tmp_path / "x.ipynb", tmp_path / "y.ipynb", Store(load_study("quick")))
    assert told["SAE_STABILITY_RESULTS"] == str(tmp_path / "out")


def test_building_again_changes_nothing(quick, site):
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    build.build(quick.study, site)
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


@pytest.mark.parametrize("name", build.chapters())
def test_chapters_are_parameterized_and_carry_no_outputs(name):
    notebook = nbformat.read(places.root() / "book" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert 'study = "quick"' in tagged[0].source  # whoever opens a chapter alone waits for minutes, not for an hour
    assert notebook.metadata.kernelspec.name == "python3"


# What a definition or a command may hold: thresholds, bands, dimensions, names of models and hooks, references.
ALLOWED = re.compile(r"```.*?```|`[^`]*`|\$[^$]*\$|\{[a-z:]+\}`[^`]*`|\b0\.7\b|\b1 %|one to one|\(\d\)", re.S)


@pytest.mark.parametrize("name", [*build.chapters(), "README.md"])
def test_no_result_is_typed_by_hand(name):
    if name == "README.md":
        prose = [(places.root() / name).read_text(encoding="utf-8")]
    else:
        notebook = nbformat.read(places.root() / "book" / f"{name}.ipynb", as_version=4)
        prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for text in prose:
        found = re.findall(r"\d+(?:\.\d+)?\s*%|\b\d+\.\d+\b", ALLOWED.sub(" ", text))
        found = [number for number in found if not re.fullmatch(r"3\.1\d|\d{4}\.\d{5}", number)]  # Python versions, arXiv numbers
        assert not found, f"{name}: {found}"


def picture() -> str:
    """A figure with lines, marks, letters and a colour map, as a PNG in base64."""
    figure, axis = plt.subplots(figsize=(4, 3))
    axis.pcolormesh(np.linspace(0, 1, 200).reshape(10, 20), cmap="cividis")
    axis.plot([0, 20], [0, 10], color="#D55E00")
    axis.set_title("some words")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=100)
    plt.close(figure)
    return base64.b64encode(written.getvalue()).decode()


def test_pictures_lose_bytes_and_nothing_that_one_sees():
    before = picture()
    after = build.in_few_colours(before)
    assert len(after) < len(before) / 2
    whole, small = (np.asarray(Image.open(io.BytesIO(base64.b64decode(of))).convert("RGB")).astype(int) for of in (before, after))
    assert whole.shape == small.shape
    assert np.abs(whole - small).mean() < 2
    assert np.quantile(np.abs(whole - small).max(2), 0.999) < 40


def test_figures_are_vectors_of_the_same_size_on_dense_screens(site, address, chromium):
    seen = """images => images.map(image => [image.currentSrc.split("/").pop(), Math.round(image.getBoundingClientRect().width)])"""
    shown = {}
    for density in (1, 2):
        page = chromium.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=density)
        page.goto(f"{address}/stability.html", wait_until="networkidle")
        page.evaluate(UNFOLD)
        shown[density] = page.locator("article figure img").evaluate_all(seen)
    names = re.findall(r'<figure[^>]* id="([^"]+)"', (site / "stability.html").read_text(encoding="utf-8"))
    assert len(names) >= 5
    assert all(name.endswith(".png") for name, _ in shown[1])
    assert [name for name, _ in shown[2]] == [f"{name}.svg" for name in names]
    assert [width for _, width in shown[1]] == [width for _, width in shown[2]]


def test_vectors_that_are_a_load_stay_out(tmp_path, monkeypatch):
    html = '<figure class="a" id="{0}">\n<img alt="b" src="_images/{0}.png" />\n</figure>'
    (tmp_path / "_images").mkdir()
    (tmp_path / build.made.FOLDER).mkdir(parents=True)
    for name, size in (("small", 10), ("large", 20)):
        Image.new("RGB", (30, 20)).save(tmp_path / "_images" / f"{name}.png")
        (tmp_path / build.made.FOLDER / f"{name}.svg").write_text("x" * size)
    monkeypatch.setattr(build, "VECTORS", 15)
    page = "".join(html.format(name) for name in ("small", "large", "without"))
    wanted = page.replace(
        'src="_images/small.png"', f'srcset="{build.made.FOLDER}/small.svg 2x" width="30" src="_images/small.png"'
    )
    assert build.sharper(page, tmp_path) == wanted


def test_staging_hides_injected_parameters_and_places_alt_texts():
    show = nbformat.v4.new_code_cell("show()")
    described = {"alt": "what it shows", "caption": "in short", "name": "fig"}
    show.outputs = [nbformat.v4.new_output("display_data", {"image/png": picture()}, metadata={"image/png": described})]
    injected = nbformat.v4.new_code_cell("study = 'x'", metadata={"tags": ["injected-parameters"]})
    title, silent = nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("if False: page.say()")
    staged = build.staged(nbformat.v4.new_notebook(cells=[title, injected, show, silent]))
    assert [cell.source for cell in staged.cells] == ["# Title", "show()", silent.source, build.SETUP, "study = 'x'"]
    assert "remove-cell" in staged.cells[4].metadata.tags
    assert [cell.metadata.mystnb["code_prompt_show"] for cell in staged.cells if cell.cell_type == "code"] == [
        "The code that draws this figure",
        "Code that shows nothing here",
        "The code that sets this page up",
    ]
    assert staged.cells[1].metadata.mystnb["image"]["alt"] == "what it shows"
    assert staged.cells[1].metadata.mystnb["figure"] == {"caption": "in short", "name": "fig"}


def test_folds_say_what_the_code_in_them_does(site):
    def cell(tags=(), **data) -> nbformat.NotebookNode:
        outputs = [nbformat.v4.new_output("display_data", data)] if data else []
        return nbformat.v4.new_code_cell("x", metadata={"tags": list(tags)}, outputs=outputs)

    assert build.does(cell(["parameters"])) == "The parameters of this page"
    assert build.does(cell(**{"text/markdown": "so it is"})) == "The code behind this text"
    assert build.does(cell(**{"text/markdown": "so:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"})) == "The code behind this table"
    assert build.does(cell(**{"text/html": "<p>"})) == "The code behind this text"
    for path in site.glob("*.html"):
        assert "Show code cell" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("name", build.chapters())
def test_a_cell_shows_a_figure_or_says_something(name):
    """What is staged gives the whole cell the caption and the name of its figure."""
    cells = nbformat.read(places.root() / "book" / f"{name}.ipynb", as_version=4).cells
    for cell in cells:
        shows = cell.source.count("page.show(")
        assert cell.cell_type != "code" or shows <= 1
        assert not (shows and re.search(r"page\.(say|box|show_html)\(", cell.source)), cell.source


def test_pages_load_neither_icons_twice_nor_all_of_mathjax_nor_the_index_of_the_search(site):
    for path in site.glob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert ('src="searchindex.js"' in page) == (path.stem == "search")
        assert "fontawesome.js" not in page
        assert "tex-chtml.js" not in page
    assert "mathjax/startup.js" in (site / "stability.html").read_text(encoding="utf-8")


def test_code_keeps_its_text_and_marks_nothing_that_has_no_colour_of_its_own(site):
    marked = '<pre><span class="n">a</span><span class="o">=</span><span class="w"> </span><span class="s2">"&lt;"</span></pre>'
    assert build.lighter(marked, searches=False) == '<pre>a<span class="o">=</span> <span class="s2">"&lt;"</span></pre>'
    assert not any(build.UNCOLOURED.search(path.read_text(encoding="utf-8")) for path in site.glob("*.html"))
    style = (site / "_static" / "pygments.css").read_text(encoding="utf-8")
    for theme in ("light", "dark"):
        of_theme = re.escape(f'html[data-theme="{theme}"] .highlight')
        (plain,) = re.findall(of_theme + r" \{[^}]*[; ]color: (#\w+)", style)
        assert re.findall(of_theme + r" \.[npw] \{ color: (#\w+)", style) == [plain] * 3


def test_every_link_leads_somewhere(site):
    from bs4 import BeautifulSoup

    pages = {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.glob("*.html")}
    places_in = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    lost = []
    for name, page in pages.items():
        for link in page.find_all("a", href=True):
            file, _, place = link["href"].partition("#")
            if file.startswith(("http", "mailto:")):
                continue
            known = places_in.get(file or name)
            if not (site / (file or name)).is_file() or (place and known is not None and place not in known):
                lost.append((name, link["href"]))
    assert not lost
