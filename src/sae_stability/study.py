"""The schema of a study: what is trained on what, how often, and what is asked of it.

A *recipe* says what is trained, up to its seed: a source, a variant, a width, a sparsity, a training. A *cell* is a recipe and what
is asked of it. A *study* is a main cell and a grid of further ones.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

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

HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
"""Hook points whose value reaches the residual stream when it is written, so that an SAE can be spliced in."""

Variants = Literal["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]
"""SAE variants: each is the file of its name in `saes/`."""

Nulls = Literal["surrogate", "randomised", "whitened", "token-conditional"]
"""What an ensemble is compared with: the same training on another source, each a class of `sources.py`."""

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
ASIDE = ("seeds", "surrogate_seeds", "nulls", "tokens")
"""Keys that name a cell only where no other tells it from the rest."""
MOST_SEEDS = 10_000
LARGEST_SEED = (1 << 32) - 1  # pilots take those beyond
MOST_FEATURES = 1 << 24
MOST_TOKENS = 10**13

Share = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
Dtype = Literal["bfloat16", "float32"]
Grid = dict[str, list[Any]]


class Recipe(BaseModel):
    """What is trained, up to its seed. An ensemble is found by its recipe, from every cell and study that asks for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="an embedded name, a local Hugging Face folder, or a hub id")
    corpus: str = Field(
        "docstrings", min_length=1, description="docstrings, code, a fetched corpus, a text file or folder, or a dataset id"
    )
    hook_name: str = Field(description="such as blocks.2.hook_resid_post")
    context: int | None = Field(
        None, ge=8, le=1 << 20, description="tokens a context; by default what the model takes, at most 256"
    )
    tokens: Tokens = Field(description="unique training tokens read from the corpus")
    norm_cutoff: Annotated[float, Field(ge=1)] | None = Field(
        None, description="leave out tokens whose activation is longer than so many times the median; by default none is"
    )
    dtype: Dtype = Field("bfloat16", description="of activations")
    model_dtype: Dtype | Literal["fastest"] = Field(
        "float32",
        description="in which the language model computes: bfloat16, float32, or fastest, which is bfloat16 where the processor "
        "multiplies it; its losses are float32",
    )

    variant: Variants = "topk"
    d_sae: Annotated[int, Field(ge=2, le=MOST_FEATURES, description="features of each SAE")]
    k: PositiveInt = Field(description="L0: features that fire on a token, which every variant is brought to")
    coefficient: PositiveFloat | None = Field(
        None, description="of the sparsity penalty of relu, gated and jumprelu; by default the one that pilot seeds find for L0 = k"
    )

    fixed_initialisation: bool = Field(False, description="every seed starts from the weights of seed 0")
    fixed_order: bool = Field(False, description="every seed reads the tokens in the order of seed 0")
    passes: Annotated[int, Field(ge=1, le=10_000)] = Field(1, description="how often the training tokens are read")
    batch: PositiveInt = Field(1024, description="tokens a step")
    rate: PositiveFloat = Field(3e-3, description="peak learning rate of Adam")
    warmup: Share = Field(0.02, description="share of the steps in which the rate rises from zero")
    decay: Share = Field(0.3, description="share of the steps, at the end, in which it falls to zero")
    clip: PositiveFloat | None = Field(None, description="norm to which each seed's gradient is clipped; by default it is not")
    encoder: Literal["fastest", "float32"] = Field(
        "fastest", description="in which training finds out what fires: bfloat16 where the processor multiplies it, else float32"
    )
    dead_after: PositiveInt = Field(100_000, description="tokens without firing after which a feature is revived (AuxK)")

    @field_validator("hook_name")
    @classmethod
    def _writable_hook(cls, value: str) -> str:
        if not re.fullmatch(rf"blocks\.\d+\.({'|'.join(HOOKS)})", value):
            raise ValueError(f"give blocks.LAYER.HOOK with HOOK one of {', '.join(HOOKS)}")
        return value

    @model_validator(mode="after")
    def _sparse(self) -> "Recipe":
        if self.k > self.d_sae:
            raise ValueError(f"k: {self.k} features can't fire out of d_sae = {self.d_sae}; lower k or raise d_sae")
        if self.batch > self.tokens:
            raise ValueError(f"batch: one step takes {self.batch} tokens, and tokens is {self.tokens}; lower batch or raise tokens")
        if self.warmup + self.decay > 1:
            raise ValueError("warmup: warmup and decay together exceed the whole training; lower one")
        return self

    @property
    def label(self) -> str:
        """What is trained, in a few words for readers. Two recipes may share it: they are told apart by their ids."""
        size = f"d_sae={self.d_sae} k={self.k} tokens={self.tokens * self.passes}"
        return f"{model_name(self.model)} {self.hook_name} {self.variant} {size}"

    @property
    def recipe(self) -> "Recipe":
        """The recipe alone, also of a cell or a study."""
        return Recipe(**{key: getattr(self, key) for key in Recipe.model_fields})


def model_name(model: str) -> str:
    """What readers call a language model: the last part of its id or folder, or the id behind a snapshot in the hub's cache."""
    path = Path(model)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


class Cell(Recipe):
    """A recipe and what is asked of it. Every key can be set in a study or its grid."""

    seeds: Annotated[int, Field(ge=1, le=MOST_SEEDS)] | list[Annotated[int, Field(le=LARGEST_SEED)]] = Field(
        description="a count or a list; two or more"
    )
    nulls: list[Nulls] = Field(
        ["surrogate"],
        description="what the same training finds in Gaussian data (surrogate), in a model with shuffled weights (randomised), on "
        "whitened activations (whitened), and in Gaussian data around each token's mean (token-conditional)",
    )
    surrogate_seeds: Annotated[int, Field(ge=2, le=MOST_SEEDS)] = Field(4, description="seeds of each null")
    evaluation_tokens: Tokens = Field(1_000_000, description="held-out tokens to measure on, where there are as many")
    threshold: float = Field(0.7, gt=0, le=1, description="cosine from which two features are the same")

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

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def kinds(self) -> list[str]:
        """The ensemble of the cell (`real`) and its nulls: the same training on other data."""
        return ["real", *self.nulls]

    def seeds_of(self, kind: str) -> list[int]:
        """The seeds of the ensemble (`real`) or of one of its nulls, which takes the first of the same."""
        return self.seed_list if kind == "real" else self.seed_list[: self.surrogate_seeds]

    @cached_property
    def id(self) -> str:
        """Short and unique: tables, claims, chapters and folders know the cell by it.

        What stands at its default is no part of it, so that a new key of the schema leaves published tables readable.
        """
        keys = self.model_dump(include=set(Cell.model_fields), exclude_defaults=True) | {"seeds": self.seed_list}
        return f"{self.variant}-{self.d_sae}-{digest(keys)[:8]}"


class Explainer(BaseModel):
    """A language model that explains features: behind any OpenAI-compatible endpoint, or a chat model on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str | None = Field(
        None,
        pattern=r"^(?i:https?)://",
        description="such as http://localhost:8000/v1; /chat/completions is added to it. Without it the model runs on this machine",
    )
    model: str = Field(
        min_length=1, description="as the endpoint calls it; of one on this machine, its folder, .gguf file or hub id"
    )
    budget: PositiveInt | None = Field(
        None, description="tokens, read and written, that an endpoint may use in all; it is never exceeded"
    )
    key: str = Field(
        "OPENAI_API_KEY",
        pattern=r"^([A-Z0-9_]+_)?API_KEY$",
        description="the environment variable that holds the key, which is never stored: NAME_API_KEY",
    )

    @field_validator("base_url")
    @classmethod
    def _encrypted(cls, value: str | None) -> str | None:
        if value is None:
            return None
        # A study may come from somebody else: the key that it names is sent to nobody in the clear.
        try:
            parts = urlsplit(value)
            host = parts.hostname
        except ValueError:  # brackets that do not close
            host = None
        if not host:
            raise ValueError("no address; give one such as https://HOST/v1")
        if parts.username or parts.password or re.search(r"(?i)(^|[&_-])(key|token)=", parts.query):
            raise ValueError("it holds a secret, which results would show; put it into the variable that explainer.key names")
        if parts.scheme != "https" and host not in LOCAL:
            raise ValueError("the key would be sent in the clear; give an https address, or one of this machine")
        return value

    @model_validator(mode="after")
    def _paid_for(self) -> "Explainer":
        if self.base_url is not None and self.budget is None:
            raise ValueError("budget: missing; give the tokens that the endpoint may use in all")
        return self


class Study(Cell):
    """A main cell, and a grid that crosses lists over any of its keys into further cells."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the folder under results/")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="CPU threads; the bits of activations depend on it. By default all cores"
    )
    notes: str = Field("", description="what was chosen and why; the book shows it")
    stream: bool = Field(False, description="compute training activations as they are needed, and keep none on disk")
    at_once: PositiveInt | None = Field(None, description="seeds that train at a time; by default as many as fit in memory")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the language model runs and SAEs are trained")
    loss_tokens: Tokens = Field(
        50_000, description="held-out tokens on which the cross-entropy is measured, and what each feature does to it"
    )
    ablation_tokens: Tokens = Field(20_000, description="held-out tokens on which it is measured without sets of features")
    world_tokens: Annotated[int, Field(ge=512, le=MOST_TOKENS)] = Field(
        500_000, description="training tokens of each synthetic world; where features have to be told apart, three times as many"
    )
    pool_controls: bool = Field(
        False, description="compare pools with what the same work buys (C9): longer training, wider SAEs, bagging and boosting"
    )
    pool_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="seeds of each pool (C9); by default a third of the seeds. There must be three pools"
    )
    explainer: Explainer | None = Field(None, description="a language model that explains features; without one C6 is not tested")
    experiments: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="the questions that are asked, with those that they read; by default all, which the book's pages need"
    )
    grid: Grid | list[Grid] = Field(
        {}, description="lists over keys of the cell, crossed into further cells; or several such grids"
    )

    @field_validator("grid")
    @classmethod
    def _known_keys(cls, value: Grid | list[Grid]) -> Grid | list[Grid]:
        for key, choices in (pair for grid in grids(value) for pair in grid.items()):
            if key not in Cell.model_fields:
                raise ValueError(f"{key} is no key of a cell{nearest(key, Cell.model_fields)}")
            if not choices:
                raise ValueError(f"{key} has an empty list; give values or drop the key")
        return value

    @model_validator(mode="after")
    def _every_cell_is_valid(self) -> "Study":
        try:
            cells = self.cells
        except ValidationError as error:
            raise ValueError(f"grid: {complaint(error, Cell)}") from None
        if self.pool_size and any(len(cell.seed_list) < 3 * self.pool_size for cell in cells.values()):
            raise ValueError(f"pool_size: three pools of {self.pool_size} need {3 * self.pool_size} seeds; lower it or raise seeds")
        if self.stream and any(cell.norm_cutoff for cell in cells.values()):
            raise ValueError("norm_cutoff: which tokens are left out is kept beside cached activations; set stream to false")
        return self

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The main cell, then those of the grids that differ from all before them, by their ids."""
        keys = {key: getattr(self, key) for key in Cell.model_fields}
        crossed = (
            dict(zip(grid, choice, strict=True)) for grid in grids(self.grid) for choice in itertools.product(*grid.values())
        )
        varied = (Cell(**{**keys, **choice}) for choice in crossed)
        cells: dict[str, Cell] = {}
        for cell in (Cell(**keys), *varied):
            cells.setdefault(cell.id, cell)
        return cells

    @property
    def main(self) -> Cell:
        return next(iter(self.cells.values()))

    @cached_property
    def names(self) -> dict[str, str]:
        """What tells each cell from the others, for readers, by its id; a single cell goes by its variant."""
        return told_apart(self.cells.values()) if len(self.cells) > 1 else {self.main.id: self.variant}

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def grids(grid: Any) -> list[dict[str, Any]]:
    """The grids of a study, which may be given as one or as a list."""
    return [each for each in (grid if isinstance(grid, list) else [grid]) if isinstance(each, dict)]


def told_apart(cells: Iterable[Cell]) -> dict[str, str]:
    """What tells some cells from one another, for readers, by their ids: the keys that vary among them.

    In the grid alone fewer keys may vary than in the study: what the grid shares is not said of each.
    """
    dumps = {cell.id: cell.model_dump() for cell in cells}

    def differ(keys: list[str]) -> int:
        return len({json.dumps([dump[key] for key in keys]) for dump in dumps.values()})

    varied = [key for key in Cell.model_fields if differ([key]) > 1]
    telling = [key for key in varied if key not in ASIDE]
    keys = telling if differ(telling) == len(dumps) else varied
    return {id: ", ".join(dump[key] if key == "variant" else f"{key}={dump[key]}" for key in keys) for id, dump in dumps.items()}


def digest(value: Any) -> str:
    """The hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def complaint(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first of pydantic's complaints, in one line that names the field and the mend."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not _is_type(part)]
    field, parent, known = ".".join(path), schema, None
    for place, part in enumerate(path):
        known = parent.model_fields.get(part)
        inner = next((kind for kind in _kinds(known) if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if place < len(path) - 1 and inner is not None:
            parent = inner
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown key{nearest(path[-1], parent.model_fields)}; drop it or correct it"
    described = known.description if known is not None and known.description else ""
    if first["type"] == "missing":
        return f"{field}: missing; add '{field}: {described}'"
    reason = " ".join(first["msg"].removeprefix("Value error, ").split())
    if not field:
        return reason
    return f"{field}: {_short(first['input'])} does not fit: {reason}" + (f" ({described})" if described else "")


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _is_type(part: int | str) -> bool:
    """Whether a part of pydantic's path names a branch of a union and not a key."""
    return isinstance(part, str) and bool(re.match(r"int$|list\[|constrained|function-|Annotated|literal", part))


def _kinds(field) -> tuple:
    return () if field is None else (field.annotation, *getattr(field.annotation, "__args__", ()))


def _short(value: Any, longest: int = 120) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
