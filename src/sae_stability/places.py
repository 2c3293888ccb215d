"""Where things stand: the checkout, what it ships, the results of studies. Asked at every call: an environment can move them."""

import os
import subprocess
from pathlib import Path

from sae_stability.errors import UserError

MODELS = ("docstrings-2l", "docstrings-4l")
"""Language models that the project ships, by name."""
FETCHED = ("smollm2-135m",)
"""Those that `sae-stability fetch-model` brings."""
CORPUS = "docstrings"
"""The corpus that the installed packages hold."""
CODE = "code"
"""Another one: their source code."""
FETCHED_CORPORA = ("wikipedia",)
"""Those that `sae-stability fetch-corpus` brings."""


def root() -> Path:
    """The checkout, in which studies, chapters and models stand: `SAE_STABILITY_ROOT`, or the folder above this package.

    Where the package was installed without its checkout, the working directory. Raises `UserError` where the variable names no
    folder.
    """
    named = os.environ.get("SAE_STABILITY_ROOT")
    checkout = Path(named or Path(__file__).parents[2]).expanduser().resolve()
    if named and not checkout.is_dir():
        raise UserError(f"SAE_STABILITY_ROOT: {named} is no folder; name a checkout, or unset it")
    return checkout if (checkout / "studies").is_dir() else Path.cwd()


def git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no git, or the checkout is no repository but a copy inside another one."""

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return said(*arguments) if Path(said("rev-parse", "--show-toplevel")).resolve() == root().resolve() else None
    except (OSError, subprocess.CalledProcessError):
        return None


def model(name: str) -> Path:
    """The folder of a language model that the project ships or fetches."""
    return root() / "models" / name


def corpus(name: str) -> Path:
    """The folder of a corpus that the project fetches."""
    return root() / "corpora" / name


def results() -> Path:
    """Where results are written: `SAE_STABILITY_RESULTS`, or `results/` in the checkout.

    Raises `UserError` where the variable names something that is no folder.
    """
    folder = Path(os.environ.get("SAE_STABILITY_RESULTS") or root() / "results").expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"SAE_STABILITY_RESULTS: {folder} is no folder; name one, or unset it")
    return folder


def published() -> Path:
    """Tables that come with this repository."""
    return root() / "published"
