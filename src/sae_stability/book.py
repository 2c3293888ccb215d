"""The book: papermill executes the chapters for a study, jupyter-book turns the executed copies into pages.

jupyter-book never executes anything. It builds into an empty folder that is renamed into place, since a build on top of
an older one keeps pages of another study, and one that was killed keeps holes.
"""

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from matplotlib.figure import Figure

from sae_stability.config import ROOT, Study, load_study
from sae_stability.figures import COLOURS
from sae_stability.matching import BANDS
from sae_stability.store import DRAWING, PACKAGE, Store, git_commit, key_of, read_json, replacing, sha256, versions, write_json

CHAPTERS = ROOT / "book"
BENCHMARKS = ROOT / "benchmarks" / "results.json"
PUBLISHED = ROOT / "published"
SITE = ROOT / "_build" / "html"
AT_ONCE = 2  # chapters under execution: most of their time goes by on one thread, a quarter of it in imports


def chapters() -> list[str]:
    """Names of the chapters, as the table of contents orders them."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [contents["root"], *(entry["file"] for entry in contents.get("chapters", []))]
    return [name for name in listed if (CHAPTERS / f"{name}.ipynb").exists()]


def execute(study: Study) -> None:
    """Execute the chapters that are not up to date into `results/STUDY/chapters/`."""
    store = Store(study)

    def of(name: str) -> None:
        key = chapter_key(store, name)
        stage = f"chapters/{name}.ipynb"
        if not store.is_done(stage, key):
            print(f"{study.name}: {stage}", flush=True)
            with store.computing_file(stage, key) as path:
                _papermill(CHAPTERS / f"{name}.ipynb", path, study.name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(of, chapters()))


def chapter_key(store: Store, name: str) -> str:
    """A chapter shows results and the code that draws them: it depends on all of both."""
    source = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))
    inputs = {
        "drawing": versions(DRAWING),
        "notebook": sha256(CHAPTERS / f"{name}.ipynb"),
        "commit": git_commit(),
        "study": store.study.sha256,
        "benchmarks": sha256(BENCHMARKS),
        "published": {str(path.relative_to(PUBLISHED)): sha256(path) for path in sorted(PUBLISHED.rglob("*.*"))},
    }
    return key_of(inputs, source, [store.provenance("tables")["key"], store.provenance("claims.json")["key"]])


def build(study: Study, site: Path = SITE) -> Path:
    """Build the book of a study whose chapters are executed; give its first page."""
    store = Store(study)
    executed = {name: store.folder / "chapters" / f"{name}.ipynb" for name in chapters()}
    static = sorted(file for file in [*CHAPTERS.rglob("*"), ROOT / "_config.yml", ROOT / "_toc.yml"] if file.is_file())
    content = {str(file): sha256(file) for file in [*executed.values(), *static]}
    key = key_of({"content": content, "drawing": versions(DRAWING)}, ("book.py",))
    stamp = site / "provenance.json"
    if stamp.is_file() and read_json(stamp)["key"] == key:
        return site / "index.html"
    print(f"{study.name}: book", flush=True)
    site.parent.mkdir(parents=True, exist_ok=True)
    for leftover in site.parent.glob(".book-*"):  # of a build that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix=".book-") as scratch:
        stage, out = Path(scratch) / "stage", Path(scratch) / "out"
        shutil.copytree(CHAPTERS, stage, ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints"))
        for name, path in executed.items():
            nbformat.write(staged(nbformat.read(path, as_version=4)), stage / f"{name}.ipynb")
        _jupyter_book(stage, out)
        built = out / "_build" / "html"
        write_json(built / "provenance.json", {"key": key, "study": study.name, "commit": git_commit()})
        old = Path(scratch) / "old"
        if site.exists():
            site.rename(old)
        built.rename(site)
    return site / "index.html"


def staged(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook as the book shows it: injected parameters hidden, alt texts and captions where MyST-NB reads them."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.setdefault("tags", [])
        if "injected-parameters" in tags:
            tags.append("remove-cell")
        for output in cell.outputs:
            described = output.get("metadata", {}).get("image/png", {})
            if "alt" in described:
                cell.metadata["mystnb"] = {
                    "image": {"alt": described["alt"]},
                    "figure": {"caption": described["caption"], "name": described["name"]},
                }
    return notebook


def open_study(name: str) -> Store:
    """What a chapter calls first: the study's results, computed where they are missing."""
    from sae_stability.pipeline import compute  # above this module; only chapters that are opened alone compute

    path = ROOT / "results" / name / "study.json"
    return compute(Study(**read_json(path)) if path.is_file() else load_study(name))


def benchmarks() -> dict:
    """What `make bench` measured last."""
    return read_json(BENCHMARKS)


def short(commit: str) -> str:
    """A commit as pages print it; what was changed since is not hidden."""
    return commit[:10] + ("+changes" if commit.endswith("+changes") else "")


def show(figure: Figure, name: str, alt: str, caption: str) -> None:
    """Display a figure with its alt text, caption and the name by which pages refer to it."""
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt, "caption": caption, "name": name}})


def say(markdown: str) -> None:
    """Display prose that is filled from results."""
    from IPython.display import Markdown, display

    display(Markdown(markdown))


def box(title: str, text: str) -> None:
    """Display a short aside, beside the line of argument; `text` is HTML."""
    from IPython.display import HTML, display

    display(HTML(f'<div class="admonition note"><p class="admonition-title">{title}</p><p>{text}</p></div>'))


def published(name: str) -> tuple[dict[str, pd.DataFrame], dict]:
    """The tables of a study that takes long to compute, as they are published, and the provenance that came with them."""
    folder = PUBLISHED / name
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}, read_json(folder / "provenance.json")


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table: nothing in it is markup."""
    shown = re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", text.replace("\n", "↵"))
    return f"<code>{shown}</code>"


def scoreboard(claims: list[dict]) -> str:
    """The ledger as a table: what is claimed, what is found."""
    signs = {"supported": "✓", "not supported": "✗", "inconclusive": "~", "not tested": "–"}
    rows = []
    for claim in claims:
        found = f"{signs[claim['verdict']]} {claim['verdict']}"
        if claim["value"] is not None:
            ends = f" [{claim['ci_low']:.2f}, {claim['ci_high']:.2f}]" if claim["ci_low"] is not None else ""
            found += f"<br>{claim['value']:.2f}{ends}"
        rows.append(f"| {claim['id']} | {claim['claim']} | {found} |")
    return "\n".join(["| | claim or question | verdict here |", "| --- | --- | --- |", *rows])


def judged(claim: dict, note: str = "") -> str:
    """A verdict with its conditions, as Markdown. Every rule is spelled out on the first page."""
    signs = {True: "met", False: "failed", None: "open"}
    rows = []
    for part in claim["conditions"]:
        value = "not defined" if part["value"] is None else f"{part['value']:.3f}"
        ends = "" if part["ci_low"] is None else f" [{part['ci_low']:.3f}, {part['ci_high']:.3f}]"
        bound = f"{'below' if part['below'] else 'above'} {part['bound']:g}"
        rows.append(f"| {part['what']} | {value}{ends} | {bound} | {signs[part['met']]} |")
    said = f"**{claim['id']} is {claim['verdict']}** {claim['scope']}{note}.\n"
    return "\n".join([said, "| condition | value, 95 % interval | bound | |", "| --- | --- | --- | --- |", *rows])


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
            style = f"background: rgba(230, 159, 0, {activation / strongest:.2f}); color: inherit"
            spans.append(f'<mark style="{style}">{text}</mark>' if activation > 0 else text)
        lines.append(f"<code>{''.join(spans)}</code>")
    told = (
        f"Feature {first['feature']} comes back in {first['matches']} of {first['trials']} other seeds "
        f"and fires on {first['frequency']:.2%} of the tokens"
    )
    told += f"; trigger: {first['trigger']}" if "trigger" in first else ""
    return f'<div class="bar" style="border-color: {COLOURS[first["band"]]}"><p>{told}</p>{"".join(lines)}</div>'


def _papermill(notebook: Path, into: Path, study: str) -> None:
    import papermill

    # No progress widgets: pages would ask another host for their scripts.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["SAE_STABILITY_ROOT"] = str(ROOT)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(into),
            parameters={"study": study},
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--log-level=40"],
            cwd=str(ROOT),
        )
    except papermill.PapermillExecutionError as error:
        kept = ROOT / "results" / study / "chapters" / f"{notebook.stem}.failed.ipynb"
        shutil.copy(into, kept)
        raise RuntimeError(
            f"{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; see {kept}"
        ) from None


def _jupyter_book(stage: Path, out: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(stage),
        "--config",
        str(ROOT / "_config.yml"),
    ]
    command += ["--toc", str(ROOT / "_toc.yml"), "--path-output", str(out), "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stage)
    if done.returncode:
        log = ROOT / "_build" / "book.log"
        with replacing(log) as temporary:
            temporary.write_text(done.stdout + done.stderr, encoding="utf-8")
        complaints = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
        raise RuntimeError(f"jupyter-book failed; {log} holds its output. " + " ".join(complaints[:3]))
