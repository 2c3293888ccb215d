"""Activations at hook points: cached on disk once, memory-mapped by everyone; and Gaussian surrogates of them.

One forward pass feeds every site that a study asks for, and stops at the last layer needed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.language.corpus import Contexts
from sae_stability.language.models import device_of
from sae_stability.store import read_metadata, save_tensors

BATCH = 16  # contexts a forward pass
CHUNK = 1 << 16  # surrogate tokens drawn at a time
BLOCK = 1 << 12  # tokens whose moments are summed at a time


class Blocks(Protocol):
    """What SAEs are trained on: blocks of activations, one after another, each read in an order of its seed's own."""

    d_in: int
    sizes: list[int]
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

    def first(self, rows: int) -> "Activations":
        """The first `rows` tokens, under the same normalisation."""
        return replace(self, data=self.data[:rows])

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
        """Memory-map what `collect` or `draw_surrogate` wrote at `path`."""
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
) -> None:
    """Write the activations of the first `tokens` text tokens at each hook point of `paths` to its file."""
    count = contexts.holding(tokens)
    with ExitStack() as stack:
        writers = {hook: stack.enter_context(_Writer(path, bridge.cfg.d_model, dtype)) for hook, path in paths.items()}
        for start in tqdm(range(0, count, BATCH), described, unit="batch", disable=None):
            for hook, x in forward(bridge, contexts, slice(start, min(start + BATCH, count)), list(paths)).items():
                writers[hook].write(x[: tokens - writers[hook].rows])


def forward(
    bridge, contexts: Contexts, rows: slice | Int[np.ndarray, "context"], hook_names: list[str]
) -> dict[str, Float[Tensor, "token d_in"]]:
    """Activations of the text tokens of some contexts at each hook point, from one pass that stops at the last layer needed."""
    ids, text = torch.from_numpy(contexts.tokens[rows]).long().to(device_of(bridge)), torch.from_numpy(contexts.is_text[rows])
    stop = max(layer_of(hook_name) for hook_name in hook_names) + 1
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(ids, names_filter=hook_names, stop_at_layer=stop)
    return {hook: cache[hook][text].cpu().clone() for hook in hook_names}


def draw_surrogate(real: Activations, path: Path, rows: int, seed: int = 0, described: str = "surrogate") -> None:
    """Write `rows` Gaussian tokens with the mean and covariance of `real`: data with no features to find (PAPER, nulls)."""
    draw, generator = gaussian(real), torch.Generator().manual_seed(seed)
    with _Writer(path, real.d_in, real.data.dtype) as writer:
        for start in tqdm(range(0, rows, CHUNK), described, unit="chunk", disable=None):
            writer.write(draw(min(CHUNK, rows - start), generator))


def gaussian(real: Activations) -> Callable[[int, torch.Generator], Float[Tensor, "token d_in"]]:
    """Draws Gaussian tokens with the mean and covariance of `real`."""
    with threads.single():
        variance, axes = torch.linalg.eigh(real.covariance.double())
    root = (axes * variance.clamp_min(0).sqrt()).T.float()

    def draw(rows: int, generator: torch.Generator) -> Float[Tensor, "token d_in"]:
        with threads.single():
            return torch.randn(rows, real.d_in, generator=generator) @ root + real.mean

    return draw


def layer_of(hook_name: str) -> int:
    return int(hook_name.split(".")[1])


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


class _Writer:
    """Appends rows to a raw file; its shape and moments go beside it when it closes well."""

    def __init__(self, path: Path, d_in: int, dtype: torch.dtype):
        self.path, self.dtype, self.rows = path, dtype, 0
        self.moments = _Moments(d_in)

    def __enter__(self) -> "_Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "wb")
        return self

    def write(self, x: Float[Tensor, "token d_in"]) -> None:
        if len(x) == 0:
            return
        x = x.to(self.dtype)
        self.moments.add(x)
        x.contiguous().view(torch.uint8).numpy().tofile(self.file)
        self.rows += len(x)

    def __exit__(self, kind: type | None, *_: Sequence) -> None:
        self.file.close()
        if kind is None:
            moments = self.moments.result()
            shape = {"rows": self.rows, "d_in": len(moments["mean"]), "dtype": str(self.dtype).removeprefix("torch.")}
            tensors = {"mean": moments["mean"], "covariance": moments["covariance"]}
            save_tensors(self.path.with_suffix(".safetensors"), tensors, {**shape, "scale": moments["scale"]})
