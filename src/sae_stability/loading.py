"""Reads a study: a YAML file, with overrides from the command line, or what a run has written down."""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import exists, path_of, read_json, readings
from sae_stability.study import Study, complaint, grids, nearest

NAMES = {"model": (*places.MODELS, *places.FETCHED), "corpus": (places.CORPUS, places.CODE, *places.FETCHED_CORPORA)}
"""Names that mean what the project ships, in every working directory."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and a number is what a reader takes it for: neither octal (010) nor of base 60 (1:30)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise ValueError(f"{key} stands twice, line {node.value[position][0].start_mark.line + 1}; keep one")
        return super().construct_mapping(node, deep)


DECIMAL = re.compile(r"[-+]?[1-9][0-9_]*|0")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^(?:{DECIMAL.pattern})$"), list("-+0123456789"))


def load_study(study: str, overrides: Sequence[str] = (), name: str | None = None) -> Study:
    """Read a study by its name in studies/ or its path, with `key=value` overrides (dots reach inside).

    Raises `UserError` that names the first bad field and the mend.
    """
    folder = places.root() / "studies"
    path = Path(study) if study.lower().endswith((".yaml", ".yml")) else folder / f"{study}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        if not known:
            raise UserError(
                f"study: there is no {study}, and no studies/ in {places.root()}; call it from a checkout, or give a .yaml file"
            )
        raise UserError(
            f"study: there is no {study}{nearest(study, known)}; studies/ holds {', '.join(known)}, or give a .yaml file"
        )
    try:
        fields = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a study is a list of 'key: value' lines; see studies/quick.yaml")
    if overrides:
        fields.pop("notes", None)  # they give the reasons of another choice
    by_hand = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        _override(fields, override)
    for grid, key in product(grids(fields.get("grid")), by_hand):
        if not {"grid", f"grid.{key}"} & set(by_hand):
            grid.pop(key, None)  # what is set by hand holds for every cell
    if name is not None:
        fields["name"] = name
    for key, names in NAMES.items():
        if key in fields:
            fields[key] = _absolute(fields[key], names, path.parent)
        for grid in grids(fields.get("grid")):
            if isinstance(grid.get(key), list):
                grid[key] = [_absolute(value, names, path.parent) for value in grid[key]]
    explainer = fields.get("explainer")
    if isinstance(explainer, dict) and "model" in explainer and explainer.get("base_url") is None:  # else the endpoint's name
        fields["explainer"] = {**explainer, "model": _absolute(explainer["model"], NAMES["model"], path.parent)}
    return read_fields(fields)


def read_study(path: Path) -> Study:
    """A study as a run wrote it down in its results."""
    return read_fields(read_json(path))


def read_fields(fields: dict) -> Study:
    """A study from its keys and values. Raises `UserError` that names the first bad field and the mend."""
    try:
        return Study(**{str(key): value for key, value in fields.items()})
    except ValidationError as error:
        raise UserError(complaint(error, Study)) from None


def _override(fields: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: give key=value, such as --set d_sae=512")
    *outer, last = key.split(".")
    inside = fields
    for part in outer:
        if inside.get(part) is None:
            inside[part] = {}
        inside = inside[part]
        if not isinstance(inside, dict):
            what = "several grids; give all of them as one list" if isinstance(inside, list) else "a value and has no keys inside"
            raise UserError(f"--set {override}: {part} holds {what}")
    try:
        inside[last] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        inside[last] = value


def _absolute(value: Any, names: Sequence[str], beside: Path) -> Any:
    """Paths that exist, from the working directory or from the folder of the study, in full: chapters are executed from another
    folder than the command. Names of what is shipped stay, and so does what stands behind a question mark."""
    if not isinstance(value, str) or not value or value in names:
        return value
    for place, told in readings(value):
        for path in (path_of(place), beside / path_of(place)):
            if exists(path):
                shipped = (name for name in names if path.resolve() == places.model(name))  # one model, however it is named
                return next(shipped, f"{path.resolve()}?{told}" if told else str(path.resolve()))
    return value
