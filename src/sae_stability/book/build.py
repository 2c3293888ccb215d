"""Builds the book: papermill executes the chapters for a study, jupyter-book turns the executed copies into pages.

jupyter-book never executes anything. It builds into an empty folder that is renamed into place, since a build on top of
an older one keeps pages of another study, and one that was killed keeps holes.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import nbformat
import yaml

from sae_stability import places
from sae_stability.book import explorer, folds, hover, kernels, launch, made, numbers, page
from sae_stability.files import locked, read_json, replacing, sha256, write_json
from sae_stability.keys import key_of, key_of_script, versions
from sae_stability.pipeline import Plan
from sae_stability.store import DRAWING, Store, git_commit
from sae_stability.study import Study

SETUP = "## Set-up of this page\n\nThe code of the page rests on these cells, which come first where it is executed."
ICONS = re.compile(r"<script[^>]*/fontawesome\.js[^>]*></script>")
"""What draws the theme's icons once more, which its stylesheet has: the largest file of every page."""
SEARCH = re.compile(r'<script src="(_static/searchtools|_static/language_data|searchindex)\.js"></script>')
"""What finds words while one types, on every page; the book has a page that searches."""
UNCOLOURED = re.compile(r'<span class="[npw]">([^<]*)</span>')
"""Names, punctuation and spaces in code, to which the style gives the colour that code has anyway: half of what is marked."""
FIGURE = re.compile(r'(?P<before><figure[^>]* id="(?P<name>[^"]+)">\s*(?:<a [^>]*>)?\s*<img [^>]*?)src="(?P<picture>[^"]+\.png)"')
"""A figure of a chapter, by its name, as it stands on a page."""
VECTORS = 300_000  # bytes of an SVG
AT_ONCE = 2  # chapters under execution: most of their time goes by on one thread, a quarter of it in imports


def chapters() -> list[str]:
    """Names of the chapters, as the table of contents orders them."""
    contents = yaml.safe_load((places.root() / "_toc.yml").read_text(encoding="utf-8"))
    listed = [contents["root"], *(entry["file"] for entry in contents.get("chapters", []))]
    return [name for name in listed if notebook(name).exists()]


def notebook(name: str) -> Path:
    """A chapter as it is written, without outputs."""
    return places.root() / "book" / f"{name}.ipynb"


def execute(study: Study) -> None:
    """Execute the chapters that are not up to date into `results/STUDY/chapters/`."""
    plan = Plan(study)
    results = [key for stage in plan.stages for key in stage.entries.values()]
    # Before there are threads: in Python 3.11 two that parse code at a time can fail (python/cpython#106905).
    keys = {name: chapter_key(study, name, results) for name in chapters()}

    def run(name: str) -> None:
        key, entry = keys[name], f"chapters/{name}.ipynb"
        if not plan.store.is_done(entry, key):
            with plan.store.locked([entry]):
                if not plan.store.is_done(entry, key):
                    print(f"{study.name}: {entry}", flush=True)
                    with plan.store.computing_file(entry, key) as path:
                        _papermill(notebook(name), path, plan.store)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, keys))


def chapter_key(study: Study, name: str, results: list[str]) -> str:
    """A chapter depends on its own code and what of the package that reaches, on its text, and on the study's results."""
    cells = nbformat.read(notebook(name), as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    folders = (places.published(), places.root() / "coursework")
    files = sorted(path for folder in folders for path in folder.rglob("*.*") if path.is_file())
    inputs = {
        "cells": [cell.source if cell.cell_type != "code" else dict(cell.metadata) for cell in cells],
        "drawing": versions(DRAWING),
        "study": study.sha256,
        "benchmarks": sha256(page.benchmarks_file()),
        "files": {str(path.relative_to(places.root())): sha256(path) for path in files},
    }
    return key_of_script(code, inputs, results)


def site_folder() -> Path:
    return places.root() / "_build" / "html"


def build(study: Study, site: Path | None = None) -> Path:
    """Build the book of a study whose chapters are executed; give its first page."""
    site = site or site_folder()
    site.parent.mkdir(parents=True, exist_ok=True)
    with locked(site.parent / ".lock", site):
        return _build(study, site)


def _build(study: Study, site: Path) -> Path:
    store, root = Store(study), places.root()
    executed = {name: store.folder / "chapters" / f"{name}.ipynb" for name in chapters()}
    static = sorted(file for file in [*(root / "book").rglob("*"), root / "_toc.yml"] if file.is_file())
    content = {"_config.yml": launch.configuration(), **{str(file): sha256(file) for file in [*executed.values(), *static]}}
    plan = Plan(study)
    results = [key for stage in plan.stages for key in stage.entries.values()]
    key = key_of({"content": content, "drawing": versions(DRAWING)}, [_build, hover.setup, folds.setup], results)
    stamp = site / "provenance.json"
    if stamp.is_file() and read_json(stamp)["key"] == key:
        return site / "index.html"
    print(f"{study.name}: book", flush=True)
    for leftover in site.parent.glob(".book-*"):  # of a build that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix=".book-") as scratch:
        stage, out = Path(scratch) / "stage", Path(scratch) / "out"
        shutil.copytree(root / "book", stage, ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints"))
        notebooks = {name: nbformat.read(path, as_version=4) for name, path in executed.items()}
        numbers.write(stage, notebooks)
        for name, notebook in notebooks.items():
            taken = store.provenance(f"chapters/{name}.ipynb") or {"commit": "unknown"}
            told = made.told(staged(notebook), stage, study.name, page.short(taken["commit"]))
            nbformat.write(told, stage / f"{name}.ipynb")
        _jupyter_book(stage, out)
        built, main = out / "_build" / "html", plan.results(study.main)
        for path in built.glob("*.html"):
            light = lighter(path.read_text(encoding="utf-8"), path.stem == "search")
            path.write_text(sharper(light, built), encoding="utf-8")
        if explorer.NEEDS in main.entries:
            explorer.write(main, built / explorer.FOLDER)
        write_json(built / "provenance.json", {"key": key, "study": study.name, "commit": git_commit()})
        old = Path(scratch) / "old"
        if site.exists():
            site.rename(old)
        built.rename(site)
    return site / "index.html"


def staged(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook as the book shows it: injected parameters hidden, alt texts and captions where MyST-NB reads them, each
    fold of code with what the code does and each of details with what they find, and the code that sets a page up behind what it
    says."""
    setup = list(takewhile(lambda cell: not cell.get("outputs"), notebook.cells))
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.setdefault("tags", [])
        cell.metadata["mystnb"] = {"code_prompt_show": does(cell, position < len(setup)), "code_prompt_hide": "Hide the code"}
        if "injected-parameters" in tags:
            tags.append("remove-cell")
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = in_few_colours(output.data["image/png"])
            described = output.get("metadata", {}).get("image/png", {})
            if "alt" in described:
                cell.metadata["mystnb"]["image"] = {"alt": described["alt"]}
                cell.metadata["mystnb"]["figure"] = {"caption": described["caption"], "name": described["name"]}
    prose, code = ([cell for cell in setup if (cell.cell_type == "code") == is_code] for is_code in (False, True))
    if code:
        notebook.cells = [*prose, *notebook.cells[len(setup) :], nbformat.v4.new_markdown_cell(SETUP), *code]
    return folds.told(notebook)


def does(cell: nbformat.NotebookNode, sets_up: bool = False) -> str:
    """What the code of an executed cell does, for the fold that hides it."""
    shown = [output.get("data", {}) for output in cell.outputs]
    if "parameters" in cell.metadata.get("tags", []):
        return "The parameters of this page"
    if not shown:
        return "The code that sets this page up" if sets_up else "Code that shows nothing here"
    if any("image/png" in each for each in shown):
        return "The code that draws this figure"
    is_table = any("| --- |" in each.get("text/markdown", "") for each in shown)
    return f"The code behind this {'table' if is_table else 'text'}"


def in_few_colours(png: str) -> str:
    """A picture (base64) with a palette of 256 colours, which a figure does with and a quarter of the bytes suffice for."""
    from PIL import Image

    whole = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    small = io.BytesIO()
    whole.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def lighter(page: str, searches: bool) -> str:
    """A page as HTML without the two megabytes that it does not need."""
    page = UNCOLOURED.sub(r"\1", ICONS.sub("", page)).replace("mathjax/tex-chtml.js", "mathjax/startup.js")
    return page if searches else SEARCH.sub("", page)


def sharper(page: str, built: Path) -> str:
    """A page as HTML whose figures are vectors on screens of more than one dot a pixel, where the vectors are no load."""
    from PIL import Image

    def with_vectors(found: re.Match) -> str:
        vectors = f"{made.FOLDER}/{found['name']}.svg"
        if not (built / vectors).is_file() or (built / vectors).stat().st_size > VECTORS:
            return found[0]
        with Image.open(built / found["picture"]) as picture:  # whose size on the page the vectors keep
            return f'{found["before"]}srcset="{vectors} 2x" width="{picture.width}" src="{found["picture"]}"'

    return FIGURE.sub(with_vectors, page)


def _papermill(notebook: Path, into: Path, store: Store) -> None:
    import papermill

    # No progress widgets: pages would ask another host for their scripts. What a user's environment says of figures, kernels and
    # warnings is for other notebooks.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("MPLBACKEND", "JUPYTER_PATH", "JUPYTER_PREFER_ENV_PATH"):
        os.environ.pop(name, None)
    os.environ["PYTHONWARNINGS"] = "ignore"
    if sys.platform == "linux":  # macOS may end a fork of a process that has imported its frameworks
        os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = kernels.NAME
    os.environ |= {"SAE_STABILITY_ROOT": str(places.root()), "SAE_STABILITY_RESULTS": str(places.results())}  # from any folder
    try:
        papermill.execute_notebook(
            str(notebook),
            str(into),
            parameters={"study": store.study.name},
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--log-level=50"],
            cwd=str(places.root()),
        )
    except papermill.PapermillExecutionError as error:
        kept = store.folder / "chapters" / f"{notebook.stem}.failed.ipynb"
        shutil.copy(into, kept)
        raise RuntimeError(
            f"{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; see {kept}"
        ) from None


def _jupyter_book(stage: Path, out: Path) -> None:
    (stage / "_config.yml").write_text(launch.configuration(), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(stage),
        "--config",
        str(stage / "_config.yml"),
    ]
    command += ["--toc", str(places.root() / "_toc.yml"), "--path-output", str(out), "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stage)
    if done.returncode:
        log = places.root() / "_build" / "book.log"
        with replacing(log) as temporary:
            temporary.write_text(done.stdout + done.stderr, encoding="utf-8")
        complaints = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
        raise RuntimeError(f"jupyter-book failed; {log} holds its output. " + " ".join(complaints[:3]))
