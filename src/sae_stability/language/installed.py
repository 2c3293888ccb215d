"""Text that the installed packages hold anyway: their docstrings, and their source code. It needs no network."""

import ast
import gc
import importlib.util
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from joblib import Parallel, delayed
from tqdm import tqdm

from sae_stability import places
from sae_stability.errors import UserError

DOCUMENTED = ("numpy", "scipy", "pandas", "matplotlib", "sympy", "networkx", "torch", "transformers")
"""Packages whose docstrings are the embedded corpus."""
SHORTEST_DOCSTRING = 80  # characters; below that a docstring is a label, not prose


def packages(corpus: str) -> tuple[str, ...]:
    """On which packages a corpus depends."""
    return DOCUMENTED if corpus == places.CORPUS else locked()


def docstrings() -> list[str]:
    """The docstrings of the packages that `requirements.lock` installs anyway: real prose and real code, no network.

    Test suites are left out: they are many files with few words.
    """
    folders = [_package_folder(package) for package in DOCUMENTED]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py")) if "tests" not in file.relative_to(folder).parts]
    found = Parallel(n_jobs=-1, return_as="generator")(delayed(_docstrings_in)(file) for file in files)
    return sorted({text for texts in tqdm(found, "docstrings", len(files), unit="file", disable=None) for text in texts})


def code() -> list[str]:
    """The Python files of the packages that requirements.lock names, a document each: 268 MB, ten times as much as the docstrings.

    Test suites are left out, as above. Raises `UserError` where a package is missing, since another text is another corpus.
    """
    files = [file for package in locked() for file in _python_files(package)]
    return [file.read_text(encoding="utf-8", errors="replace") for file in tqdm(files, "code", unit="file", disable=None)]


def locked() -> tuple[str, ...]:
    """The packages of requirements.lock."""
    lock = places.root() / "requirements.lock"
    if not lock.is_file():
        raise UserError(f"corpus: {places.CODE} needs requirements.lock, which {places.root()} lacks; set SAE_STABILITY_ROOT")
    return tuple(line.partition("==")[0] for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)


def _python_files(package: str) -> list[Path]:
    try:
        listed = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"corpus: {places.CODE} needs the package {package}; install requirements.lock") from None
    chosen = sorted(file for file in listed if file.suffix == ".py" and not {"tests", "test"} & set(file.parts))
    return [Path(str(file.locate())) for file in chosen if Path(str(file.locate())).is_file()]


def _docstrings_in(file: Path) -> list[str]:
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of small objects without cycles: collecting them takes twice the parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node) for node in _statements(tree) if isinstance(node, documented))
        return [text for text in texts if text and len(text) >= SHORTEST_DOCSTRING]
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return []
    finally:
        if collecting:
            gc.enable()


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and every statement below it; expressions hold no docstrings, and are most of a tree."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"corpus: {places.CORPUS} needs the package {package}; install requirements.lock")
    return Path(next(iter(spec.submodule_search_locations)))
