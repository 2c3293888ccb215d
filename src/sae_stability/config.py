"""The schema of a study: what is trained on what, how often, and when two features are the same."""

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from sae_stability.errors import UserError

ROOT = Path(os.environ.get("SAE_STABILITY_ROOT") or Path(__file__).parents[2]).resolve()
"""The checkout: studies, chapters and results stand here, wherever a notebook or a command is started."""

HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
"""Hook points whose value reaches the residual stream when it is written, so that an SAE can be spliced in."""

Variants = Literal["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]
"""SAE variants: each is the file of its name in `saes/`."""

Share = Annotated[float, Field(ge=0, le=1)]


class Cell(BaseModel):
    """One ensemble to train: a site, a variant, a width and a sparsity. Every key can be set in a study or its grid."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="an embedded name, a local Hugging Face folder, or a hub id")
    corpus: str = Field("docstrings", min_length=1, description="the embedded corpus, a text file or folder, or a dataset id")
    hook_name: str = Field(description="such as blocks.2.hook_resid_post")
    context: int | None = Field(None, ge=8, description="tokens a context; by default what the model takes, at most 256")
    tokens: PositiveInt = Field(description="unique training tokens read from the corpus")
    evaluation_tokens: PositiveInt = Field(1_000_000, description="held-out tokens to measure on, where there are as many")

    variant: Variants = "topk"
    d_sae: Annotated[int, Field(ge=2, description="features of each SAE")]
    k: PositiveInt = Field(description="L0: features that fire on a token, which every variant is brought to")
    coefficient: PositiveFloat | None = Field(
        None, description="of the sparsity penalty of relu, gated and jumprelu; by default the one that pilot seeds find for L0 = k"
    )

    seeds: PositiveInt | list[int] = Field(description="a count or a list; two or more")
    fixed_initialisation: bool = Field(False, description="every seed starts from the weights of seed 0")
    fixed_order: bool = Field(False, description="every seed reads the tokens in the order of seed 0")
    nulls: list[Literal["surrogate", "randomised"]] = Field(
        ["surrogate"],
        description="what the same training finds in Gaussian data (surrogate), in a model with shuffled weights (randomised)",
    )
    surrogate_seeds: int = Field(4, ge=2, description="seeds of each null")

    passes: PositiveInt = Field(1, description="how often the training tokens are read")
    batch: PositiveInt = Field(1024, description="tokens a step")
    rate: PositiveFloat = Field(3e-3, description="peak learning rate of Adam")
    warmup: Share = Field(0.02, description="share of the steps in which the rate rises from zero")
    decay: Share = Field(0.3, description="share of the steps, at the end, in which it falls to zero")
    clip: PositiveFloat | None = Field(None, description="norm to which each seed's gradient is clipped; by default it is not")
    encoder: Literal["fastest", "float32"] = Field(
        "fastest", description="in which training finds out what fires: bfloat16 where the processor multiplies it, else float32"
    )
    dead_after: PositiveInt = Field(100_000, description="tokens without firing after which a feature is revived (AuxK)")

    threshold: float = Field(0.7, gt=0, le=1, description="cosine from which two features are the same")

    @field_validator("hook_name")
    @classmethod
    def _writable_hook(cls, value: str) -> str:
        if not re.fullmatch(rf"blocks\.\d+\.({'|'.join(HOOKS)})", value):
            raise ValueError(f"give blocks.LAYER.HOOK with HOOK one of {', '.join(HOOKS)}")
        return value

    @field_validator("seeds")
    @classmethod
    def _two_seeds(cls, value: int | list[int]) -> int | list[int]:
        if (value if isinstance(value, int) else len(value)) < 2:
            raise ValueError("stability compares seeds: give two or more")
        if isinstance(value, list) and min(value) < 0:
            raise ValueError("a seed is negative; count from 0")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("a seed stands twice in the list; give each once")
        return value

    @field_validator("nulls")
    @classmethod
    def _primary_null(cls, value: list[str]) -> list[str]:
        if "surrogate" not in value or len(set(value)) < len(value):
            raise ValueError("give surrogate, the primary null, and each null once")
        return value

    @model_validator(mode="after")
    def _sparse(self) -> "Cell":
        if self.k > self.d_sae:
            raise ValueError(f"k: {self.k} features can't fire out of d_sae = {self.d_sae}; lower k or raise d_sae")
        if self.batch > self.tokens:
            raise ValueError(f"batch: one step takes {self.batch} tokens, and tokens is {self.tokens}; lower batch or raise tokens")
        if self.warmup + self.decay > 1:
            raise ValueError("warmup: warmup and decay together exceed the whole training; lower one")
        return self

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def seeds_of(self, kind: str) -> list[int]:
        """The seeds of the ensemble (`real`) or of one of its nulls, which takes the first of the same."""
        return self.seed_list if kind == "real" else self.seed_list[: self.surrogate_seeds]

    @property
    def label(self) -> str:
        """How tables and claims name the cell."""
        size = f"d_sae={self.d_sae} k={self.k} tokens={self.tokens * self.passes}"
        return f"{Path(self.model).name} {self.hook_name} {self.variant} {size}"


class Explainer(BaseModel):
    """A language model that explains features, behind any OpenAI-compatible endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern=r"^https?://", description="such as http://localhost:8000/v1; /chat/completions is added to it")
    model: str = Field(min_length=1, description="as the endpoint calls it")
    budget: PositiveInt = Field(description="tokens, read and written, that may be used in all; it is never exceeded")
    key: str = Field(
        "OPENAI_API_KEY", min_length=1, description="the environment variable that holds the key, which is never stored"
    )


class Study(Cell):
    """A main cell, and a grid that crosses lists over any of its keys into further cells."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the folder under results/")
    threads: PositiveInt | None = Field(None, description="CPU threads; the bits of activations depend on it. By default all cores")
    notes: str = Field("", description="what was chosen and why; the book shows it")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of activations")
    stream: bool = Field(False, description="compute training activations as they are needed, and keep none on disk")
    at_once: PositiveInt | None = Field(None, description="seeds that train at a time; by default as many as fit in memory")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where SAEs are trained")
    loss_tokens: PositiveInt = Field(
        50_000, description="held-out tokens on which the cross-entropy is measured, and what each feature does to it"
    )
    ablation_tokens: PositiveInt = Field(20_000, description="held-out tokens on which it is measured without sets of features")
    explainer: Explainer | None = Field(None, description="a language model that explains features; without one C6 is not tested")
    grid: dict[str, list[Any]] = Field({}, description="lists over keys of the cell, crossed into further cells")

    @field_validator("grid")
    @classmethod
    def _known_keys(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, choices in value.items():
            if key not in Cell.model_fields:
                raise ValueError(f"{key} is no key of a cell{_nearest(key, Cell.model_fields)}")
            if not choices:
                raise ValueError(f"{key} has an empty list; give values or drop the key")
        return value

    @model_validator(mode="after")
    def _every_cell_is_valid(self) -> "Study":
        try:
            len(self.cells)
        except ValidationError as error:
            raise ValueError(f"grid: {explain(error, Cell)}") from None
        return self

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The main cell and those of the grid, by the name of their folder."""
        main = {key: getattr(self, key) for key in Cell.model_fields}
        cells = {"main": Cell(**main)}
        for choice in itertools.product(*self.grid.values()):
            varied = dict(zip(self.grid, choice, strict=True))
            cell = Cell(**{**main, **varied})
            if cell not in cells.values():
                cells[",".join(f"{key}={_slug(value)}" for key, value in varied.items())] = cell
        return cells

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_study(study: str, overrides: Sequence[str] = (), name: str | None = None) -> Study:
    """Read a study by its name in studies/ or its path, with `key=value` overrides (dots reach inside).

    Raises `UserError` that names the first bad field and the mend.
    """
    path = Path(study) if study.endswith((".yaml", ".yml")) else ROOT / "studies" / f"{study}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (ROOT / "studies").glob("*.yaml"))
        raise UserError(
            f"study: there is no {study}{_nearest(study, known)}; studies/ holds {', '.join(known)}, or give a .yaml file"
        )
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a study is a list of 'key: value' lines; see studies/quick.yaml")
    if overrides:
        fields.pop("notes", None)  # they give the reasons of another choice
    for override in overrides:
        _override(fields, override)
        if isinstance(fields.get("grid"), dict):  # what is set by hand holds for every cell
            fields["grid"].pop(override.partition("=")[0], None)
    if name is not None:
        fields["name"] = name
    grid = fields.get("grid")
    for key in ("model", "corpus"):
        if key in fields:
            fields[key] = _absolute(fields[key])
        if isinstance(grid, dict) and isinstance(grid.get(key), list):
            grid[key] = [_absolute(value) for value in grid[key]]
    try:
        return Study(**{str(key): value for key, value in fields.items()})
    except ValidationError as error:
        raise UserError(explain(error, Study)) from None


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first of pydantic's complaints, in one line."""
    first = error.errors()[0]
    field = ".".join(
        str(part) for part in first["loc"] if part not in {"int", "list[int]"} and not str(part).startswith("constrained")
    )
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown key{_nearest(field, schema.model_fields)}; drop it or correct it"
    if first["type"] == "missing":
        return f"{field}: missing; add '{field}: {schema.model_fields[field].description}'"
    reason = first["msg"].removeprefix("Value error, ")
    if not field:
        return reason
    described = schema.model_fields[first["loc"][0]].description
    return f"{field}: {first['input']!r} does not fit: {reason}" + (f" ({described})" if described else "")


def _override(fields: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: give key=value, such as --set d_sae=512")
    *outer, last = key.split(".")
    inside = fields
    for part in outer:
        inside = inside.setdefault(part, {})
        if not isinstance(inside, dict):
            raise UserError(f"--set {override}: {part} holds a value and has no keys inside")
    try:
        inside[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        inside[last] = value


def _absolute(value):
    """Paths that exist in full: chapters are executed from another folder than the command."""
    path = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(path.resolve()) if path is not None and path.exists() else value


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _slug(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
