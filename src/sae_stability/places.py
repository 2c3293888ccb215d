"""Where things stand: the checkout, what it ships, the results of studies. Asked at every call: an environment can move them."""

import os
from pathlib import Path

MODELS = ("docstrings-2l", "docstrings-4l")
"""Language models that the project ships, by name."""
FETCHED = ("smollm2-135m",)
"""Those that `sae-stability fetch-model` brings."""
CORPUS = "docstrings"
"""The corpus that the installed packages hold."""


def root() -> Path:
    """The checkout, in which studies, chapters and models stand: `SAE_STABILITY_ROOT`, or the folder above this package.

    Where the package was installed without its checkout, the working directory.
    """
    checkout = Path(os.environ.get("SAE_STABILITY_ROOT") or Path(__file__).parents[2]).resolve()
    return checkout if (checkout / "studies").is_dir() else Path.cwd()


def results() -> Path:
    """Where results are written: `SAE_STABILITY_RESULTS`, or `results/` in the checkout."""
    return Path(os.environ.get("SAE_STABILITY_RESULTS") or root() / "results").resolve()


def published() -> Path:
    """Tables that come with this repository."""
    return root() / "published"
