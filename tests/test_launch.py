"""Buttons that open a chapter elsewhere lead to the file of the chapter, in the repository that the checkout comes from."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sae_stability.book import build, launch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/some-one/a.book.git",
        "https://github.com/some-one/a.book",
        "https://github.com/some-one/a.book/",
        "https://x-access-token:s3cret@github.com/some-one/a.book.git",
        "git@github.com:some-one/a.book.git",
        "ssh://git@github.com/some-one/a.book.git",
    ],
)
def test_the_ways_in_which_git_names_a_repository_lead_to_one_page_without_secrets(remote):
    assert launch.public(remote) == "https://github.com/some-one/a.book"


@pytest.mark.parametrize(
    "remote",
    ["", "/srv/git/book.git", "https://git.example.com/a/b.git", "https://github.com/a", "https://github.com.evil.org/a/b"],
)
def test_no_other_repository_has_a_button(remote):
    assert launch.public(remote) is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A book of one chapter in a repository of its own."""
    folder = tmp_path / "book"
    (tmp_path / "studies").mkdir()  # as in every checkout
    folder.mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    for name in ("_static", "references.bib"):
        (shutil.copytree if (ROOT / "book" / name).is_dir() else shutil.copy)(ROOT / "book" / name, folder / name)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# A chapter", "id": "one"}]
    (folder / "chapter.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: chapter\n")
    monkeypatch.setenv("SAE_STABILITY_ROOT", str(tmp_path))
    subprocess.run(["git", "init", "--quiet", "--initial-branch", "trunk", tmp_path], check=True)
    return tmp_path


def test_a_book_of_a_public_repository_opens_each_chapter_on_binder_and_on_the_hub_of_a_course(checkout):
    subprocess.run(["git", "remote", "add", "origin", "git@github.com:some-one/book.git"], cwd=checkout, check=True)
    hub = (checkout / "_config.yml").read_text().replace("# jupyterhub_url", "jupyterhub_url")
    (checkout / "_config.yml").write_text(hub)
    build._jupyter_book(checkout / "book", checkout / "out")
    page = (checkout / "out/_build/html/chapter.html").read_text()
    assert "https://mybinder.org/v2/gh/some-one/book/trunk?urlpath=lab/tree/book/chapter.ipynb" in page
    assert "hub.example.edu/hub/user-redirect/git-pull?" in page
    assert "lab/tree/book/book/chapter.ipynb" in page


def test_a_checkout_from_nowhere_or_inside_another_repository_has_none(checkout, monkeypatch):
    build._jupyter_book(checkout / "book", checkout / "out")
    assert "mybinder" not in (checkout / "out/_build/html/chapter.html").read_text()
    subprocess.run(["git", "remote", "add", "origin", "https://github.com/some-one/book.git"], cwd=checkout, check=True)
    inside = shutil.copytree(checkout, checkout / "inside", ignore=shutil.ignore_patterns(".git", "out"))
    monkeypatch.setenv("SAE_STABILITY_ROOT", str(inside))
    assert yaml.safe_load(launch.configuration())["launch_buttons"] == {"thebe": False}
