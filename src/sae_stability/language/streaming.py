"""Activations that are never stored: computed block by block when training asks for them.

The block is the shuffle buffer: contexts come in random order, and each seed reads the tokens of a block in an order of its own.
One forward pass gives a block of every site, and all cells of a study read it before the next one is computed. Only the pilots that
steer a penalty read the stream on their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability.language.activations import BATCH, Activations, forward, gaussian
from sae_stability.language.corpus import Contexts

SURROGATE_SEEDS = 1 << 32  # beyond those of surrogates that are cached
BLOCK = 1 << 18  # tokens: the size of the shuffle buffer


@dataclass(eq=False)
class Stream:
    """The text of a source, in blocks of whole contexts, and its activations at some hook points."""

    bridge: object
    contexts: Contexts
    hook_names: list[str]
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    block_tokens: int = BLOCK
    held: tuple[int, dict[str, Float[Tensor, "token d_in"]]] | None = None
    """The last block computed, and its index."""
    first_blocks: dict[str, Activations] = field(default_factory=dict)

    def __post_init__(self):
        order = np.random.default_rng(0).permutation(len(self.contexts.tokens))
        before = np.cumsum(self.contexts.is_text[order].sum(1))
        count = int(np.searchsorted(before, self.tokens)) + 1
        block = (before[:count] - 1) // self.block_tokens  # of the context's last token
        self.rows: list[Int[np.ndarray, context]] = np.split(order[:count], np.flatnonzero(np.diff(block)) + 1)
        self.sizes = [int(self.contexts.is_text[rows].sum()) for rows in self.rows]

    def site(self, hook_name: str) -> "Streamed":
        """The activations at one hook point, under the normalisation of its first block."""
        return Streamed(self.bridge.cfg.d_model, self.sizes, partial(self._block, hook_name))

    def surrogate(self, hook_name: str) -> "Streamed":
        """Gaussian tokens with the mean and covariance of the site's first block."""
        return Streamed(self.bridge.cfg.d_model, self.sizes, partial(self._surrogate, hook_name))

    def _block(self, hook_name: str, index: int) -> Activations:
        if hook_name not in self.first_blocks:
            # Only the moments are kept.
            computed = self._compute(0)
            self.first_blocks = {hook: Activations.of(x).with_data(x.new_empty(0, x.shape[1])) for hook, x in computed.items()}
        return self.first_blocks[hook_name].with_data(self._compute(index)[hook_name])

    def _surrogate(self, hook_name: str, index: int) -> Activations:
        if hook_name not in self.first_blocks:
            self._block(hook_name, 0)
        real = self.first_blocks[hook_name]
        drawn = gaussian(real)(self.sizes[index], torch.Generator().manual_seed(SURROGATE_SEEDS + index))
        return real.with_data(drawn.to(self.dtype))

    def _compute(self, index: int) -> dict[str, Float[Tensor, "token d_in"]]:
        if self.held is None or self.held[0] != index:
            self.held = None  # room for the next one
            rows = self.rows[index]
            starts = range(0, len(rows), BATCH)
            parts = [forward(self.bridge, self.contexts, rows[start : start + BATCH], self.hook_names) for start in starts]
            self.held = (index, {hook: torch.cat([part[hook].to(self.dtype) for part in parts]) for hook in self.hook_names})
        return self.held[1]


@dataclass(frozen=True)
class Streamed:
    """The blocks of one site (see `activations.Blocks`)."""

    d_in: int
    sizes: list[int]
    compute: Callable[[int], Activations]

    def __len__(self) -> int:
        return sum(self.sizes)

    def block(self, index: int) -> Activations:
        return self.compute(index).first(self.sizes[index])

    def first(self, rows: int) -> "Streamed":
        ends = np.cumsum(self.sizes)
        sizes = [int(min(size, rows - (end - size))) for size, end in zip(self.sizes, ends, strict=True) if end - size < rows]
        return Streamed(self.d_in, sizes, self.compute)
