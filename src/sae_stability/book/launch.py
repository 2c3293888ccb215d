"""Buttons that open a chapter on Binder, or on a JupyterHub that `_config.yml` names, where others can fetch this repository.

Its address is that of the checkout's remote `origin`: a fork has buttons of its own, and a checkout without one has none. Both
services make the environment of `environment.yml`. Colab has no button: it brings an environment of its own, without the package.
"""

import re

import yaml

from sae_stability import places

PUBLIC = re.compile(
    r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)(?P<host>github\.com|gitlab\.com)[/:](?P<path>[\w.-]+/[\w.-]+?)(?:\.git)?/?"
)
"""Addresses of repositories that those services read. What stands before an @ may be a secret, and is left out."""


def configuration() -> str:
    """The book's `_config.yml`, with the address of the repository; without buttons, where it has no public one."""
    settings = yaml.safe_load((places.root() / "_config.yml").read_text(encoding="utf-8"))
    address = public(places.git("remote", "get-url", "origin") or "")
    if address is not None:
        branch = places.git("branch", "--show-current") or "main"
        settings["repository"] = {"url": address, "branch": branch, "path_to_book": "book"}
    else:
        settings["launch_buttons"] = {"thebe": False}  # else they would open Jupyter Book's own repository
    return yaml.safe_dump(settings, sort_keys=False)


def public(remote: str) -> str | None:
    """The page of a repository, from how git names it; None for one that is not on a public host."""
    found = PUBLIC.fullmatch(remote)
    return f"https://{found['host']}/{found['path']}" if found else None
