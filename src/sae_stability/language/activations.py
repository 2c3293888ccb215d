"""Activations at hook points: cached on disk once, memory-mapped by everyone.

One forward pass feeds every site that a study asks for, and stops at the last layer needed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.files import read_metadata, save_tensors, telling_of_a_full_disk
from sae_stability.language.corpus import Contexts
from sae_stability.language.models import device_of

BATCH = 16  # contexts a forward pass
CHUNK = 1 << 16  # surrogate tokens drawn at a time
MEDIAN_TOKENS = 1 << 16  # whose norms say what is long
BLOCK = 1 << 12  # tokens whose moments are summed at a time


class Blocks(Protocol):
    """What SAEs are trained on: blocks of activations, one after another, each read in an order of its seed's own."""

    @property
    def d_in(self) -> int: ...

    @property
    def sizes(self) -> list[int]:
        """Tokens of each block."""

    def __len__(self) -> int: ...

    def block(self, index: int) -> "Activations": ...

    def first(self, rows: int) -> "Blocks": ...


@dataclass(frozen=True)
class Activations:
    """Token activations at one site, with the normalisation that SAEs are trained under."""

    data: Float[Tensor, "token d_in"]
    """As the model computes them; memory-mapped, in bfloat16 or float32."""
    mean: Float[Tensor, "d_in"]
    scale: float
    """`(x - mean) * scale` has average norm sqrt(d_in)."""
    covariance: Float[Tensor, "d_in d_in"]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def d_in(self) -> int:
        return self.data.shape[1]

    def normalised(self, rows: Int[Tensor, "row"] | slice) -> Float[Tensor, "row d_in"]:
        chosen = self.data[rows] if isinstance(rows, slice) else self.data.index_select(0, rows)
        return (chosen.float() - self.mean) * self.scale

    def to(self, device: torch.device) -> "Activations":
        """The same in the memory of a device."""
        return replace(self, data=self.data.to(device), mean=self.mean.to(device))

    def first(self, rows: int) -> "Activations":
        """The first `rows` tokens, under the same normalisation."""
        return replace(self, data=self.data[:rows])

    def normalised_by_first(self, rows: int) -> "Activations":
        """The first `rows` tokens, under the normalisation of these alone: what else is cached plays no part."""
        return self if rows == len(self) else Activations.of(self.data[:rows])

    def with_moments(self, mean: Float[Tensor, "d_in"], covariance: Float[Tensor, "d_in d_in"]) -> "Activations":
        """The same tokens, said to have another mean and covariance."""
        return replace(self, mean=mean, covariance=covariance)

    def with_data(self, data: Float[Tensor, "token d_in"]) -> "Activations":
        """Other tokens, under the same normalisation."""
        return replace(self, data=data)

    @property
    def sizes(self) -> list[int]:
        """As `Blocks`: one block of all tokens."""
        return [len(self)]

    def block(self, index: int) -> "Activations":
        return self

    @classmethod
    def of(cls, x: Float[Tensor, "token d_in"]) -> "Activations":
        """Activations held in memory."""
        moments = _Moments(x.shape[1])
        moments.add(x)
        return cls(x, **moments.result())

    @classmethod
    def open(cls, path: Path) -> "Activations":
        """Memory-map what `collect` or `sources.write_drawn` wrote at `path`."""
        moments = load_file(path.with_suffix(".safetensors"))
        shape = read_metadata(path.with_suffix(".safetensors"))
        dtype = getattr(torch, shape["dtype"])
        data = torch.from_file(str(path), shared=False, size=shape["rows"] * shape["d_in"], dtype=dtype)
        return cls(data.view(shape["rows"], shape["d_in"]), moments["mean"], shape["scale"], moments["covariance"])


def collect(
    bridge,
    contexts: Contexts,
    paths: dict[str, Path],
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    described: str = "activations",
    longest: dict[str, float] | None = None,
) -> None:
    """Write the activations of the first `tokens` text tokens at each hook point of `paths` to its file.

    Tokens whose activation is longer than `longest` of the hook point are left out, and others read in their place; which ones were
    kept stands beside the file (`kept`).
    """
    longest = longest or {}
    count = len(contexts.tokens) if longest else contexts.holding(tokens)
    with ExitStack() as stack:
        writers = {hook: stack.enter_context(Writer(path, bridge.cfg.d_model, dtype)) for hook, path in paths.items()}
        with tqdm(total=tokens, desc=described, unit="tok", unit_scale=True, disable=None) as bar:
            for found in forward_all(bridge, contexts, np.arange(count), list(paths)):
                for hook, x in found.items():
                    writers[hook].write_kept(x, tokens, longest.get(hook))
                done = min(writer.rows for writer in writers.values())
                bar.update(done - bar.n)
                if done == tokens:
                    break


def longest_norms(bridge, contexts: Contexts, hook_names: list[str], cutoff: float) -> dict[str, float]:
    """At each hook point, `cutoff` times the median norm of the activations of the first `MEDIAN_TOKENS` text tokens."""
    norms: dict[str, list[Tensor]] = {hook: [] for hook in hook_names}
    for found in forward_all(bridge, contexts, np.arange(contexts.holding(MEDIAN_TOKENS)), hook_names):
        for hook, x in found.items():
            norms[hook].append(x.float().norm(dim=1))
    return {hook: cutoff * torch.cat(parts).median().item() for hook, parts in norms.items()}


def kept(path: Path, contexts: Contexts) -> Contexts:
    """The contexts of which `collect` wrote the activations at `path`, with the tokens that it left out no longer text."""
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        if "kept" not in file.keys():  # noqa: SIM118, no mapping
            return contexts
        chosen = file.get_tensor("kept").numpy()
    is_text = contexts.is_text.copy()
    places = np.flatnonzero(is_text)[: len(chosen)]
    is_text.flat[places[~chosen]] = False
    return replace(contexts, is_text=is_text)


def forward_all(
    bridge, contexts: Contexts, rows: Int[np.ndarray, "context"], hook_names: list[str]
) -> Iterator[dict[str, Float[Tensor, "token d_in"]]]:
    """What `forward` gives for some contexts, `BATCH` of them at a time, in their order.

    On the CPU as many are worked on at a time as there are threads: threads that share one wait for one another after each of its
    many small steps. Each has a copy of the model, since hooks are hung into modules; copies share all weights.
    """
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    at_once = threads.workers(len(batches)) if device_of(bridge).type == "cpu" else 1
    weights = {id(tensor): tensor for tensor in (*bridge.parameters(), *bridge.buffers())}
    idle: SimpleQueue[Any] = SimpleQueue()  # models
    for model in (bridge, *(copy.deepcopy(bridge, weights.copy()) for _ in range(at_once - 1))):
        idle.put(model)

    def run(batch: Int[np.ndarray, "context"]) -> dict[str, Float[Tensor, "token d_in"]]:
        model = idle.get()
        try:
            return forward(model, contexts, batch, hook_names)
        finally:
            idle.put(model)

    return threads.in_order(run, batches, at_once)


def forward(
    bridge, contexts: Contexts, rows: slice | Int[np.ndarray, "context"], hook_names: list[str]
) -> dict[str, Float[Tensor, "token d_in"]]:
    """Activations of the text tokens of some contexts at each hook point, from one pass that stops at the last layer needed.

    What has heads is joined over them. Raises `UserError` for a hook point that gives no vector a token.
    """
    ids, text = torch.from_numpy(contexts.tokens[rows]).long().to(device_of(bridge)), torch.from_numpy(contexts.is_text[rows])
    layers = [layer_of(hook_name) for hook_name in hook_names]
    stop = None if None in layers else max(layer for layer in layers if layer is not None) + 1
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(ids, names_filter=hook_names, stop_at_layer=stop)
    found = {}
    for hook in hook_names:
        if hook not in cache:
            raise UserError(f"hook_name: the model does not pass {hook} as it reads a text; name another site")
        x = cache[hook]
        if x.shape[:2] != ids.shape or x.ndim < 3:
            raise UserError(f"hook_name: {hook} gives {list(x.shape)}, no vector a token; name another site")
        found[hook] = x[text].flatten(1).cpu().clone()
    return found


def gaussian(real: Activations) -> Callable[[int, torch.Generator], Float[Tensor, "token d_in"]]:
    """Draws Gaussian tokens with the mean and covariance of `real`."""
    with threads.single():
        variance, axes = torch.linalg.eigh(real.covariance.double())
    root = (axes * variance.clamp_min(0).sqrt()).T.float()

    def draw(rows: int, generator: torch.Generator) -> Float[Tensor, "token d_in"]:
        with threads.single():
            return torch.randn(rows, real.d_in, generator=generator) @ root + real.mean

    return draw


def whitening(covariance: Float[Tensor, "d_in d_in"], smallest: float) -> Float[Tensor, "d_in d_in"]:
    """The symmetric map under which activations have the identity as covariance.

    Variances below `smallest` of the mean one are raised to it: whitening would blow up their noise.
    """
    with threads.single():
        variances, axes = torch.linalg.eigh(covariance.double())
        return ((axes / variances.clamp(min=smallest * variances.mean()).sqrt()) @ axes.T).float()


def layer_of(hook_name: str) -> int | None:
    """The block that a hook point is in; None for those before and behind all blocks, such as the embedding."""
    parts = hook_name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


class _Moments:
    """Mean, covariance and average norm of a stream, in float64 and by one thread: the same bits for every number of them."""

    def __init__(self, d_in: int):
        self.rows = 0
        self.first = torch.zeros(d_in, dtype=torch.float64)
        self.second = torch.zeros(d_in, d_in, dtype=torch.float64)

    def add(self, x: Float[Tensor, "token d_in"]) -> None:
        with threads.single():
            for block in x.split(BLOCK):
                block = block.double()
                self.first += block.sum(0)
                self.second += block.T @ block
        self.rows += len(x)

    def result(self) -> dict:
        """The scale takes sqrt of the mean squared norm: it is the norm's average up to its spread, and needs one pass."""
        mean = self.first / self.rows
        covariance = self.second / self.rows - torch.outer(mean, mean)
        scale = (len(mean) / covariance.trace().clamp_min(1e-12)).sqrt().item()
        return {"mean": mean.float(), "scale": scale, "covariance": covariance.float()}


class Writer:
    """Appends rows to a raw file; its shape and moments go beside it when it closes well."""

    def __init__(self, path: Path, d_in: int, dtype: torch.dtype):
        self.path, self.dtype, self.rows = path, dtype, 0
        self.moments = _Moments(d_in)
        self.kept: list[Tensor] = []

    def __enter__(self) -> "Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "wb")
        return self

    def write(self, x: Float[Tensor, "token d_in"]) -> None:
        if len(x) == 0:
            return
        x = x.to(self.dtype)
        self.moments.add(x)
        with telling_of_a_full_disk(self.path):
            self.file.write(x.contiguous().view(torch.uint8).numpy().data)
        self.rows += len(x)

    def write_kept(self, x: Float[Tensor, "token d_in"], most: int, longest: float | None) -> None:
        """Append the rows that are at most `longest`, as long as there are fewer than `most` in all."""
        if longest is not None:
            kept = x.float().norm(dim=1) <= longest
            kept &= kept.cumsum(0) <= most - self.rows
            self.kept.append(kept)
            x = x[kept]
        self.write(x[: most - self.rows])

    def __exit__(self, kind: type | None, *_: object) -> None:
        with telling_of_a_full_disk(self.path):
            self.file.close()
        if kind is None:
            moments = self.moments.result()
            shape = {"rows": self.rows, "d_in": len(moments["mean"]), "dtype": str(self.dtype).removeprefix("torch.")}
            tensors = {"mean": moments["mean"], "covariance": moments["covariance"]}
            if self.kept:
                tensors["kept"] = torch.cat(self.kept)
            save_tensors(self.path.with_suffix(".safetensors"), tensors, {**shape, "scale": moments["scale"]})
