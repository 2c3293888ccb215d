"""Activations that are never stored: computed block by block when training asks for them.

The block is the shuffle buffer: contexts come in random order, and each seed reads the tokens of a block in an order of its own.
One forward pass gives a block of every site, and all cells of a study read it before the next one is computed. Only the pilots that
steer a penalty read the stream on their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability.language.activations import Activations, forward_all
from sae_stability.language.corpus import Contexts

DRAWN_SEEDS = 1 << 31  # beyond those of null sources that are cached; generators keep 32 bits of a seed
BLOCK = 1 << 18  # tokens: the size of the shuffle buffer

Fit = Callable[[Activations, Int[Tensor, "token"]], Callable]
"""Makes of real activations, whose rows have the given ids, what draws tokens of a null source."""


@dataclass(eq=False)
class Stream:
    """The text of a source, in blocks of whole contexts, and its activations at some hook points."""

    bridge: Any
    """The language model, a TransformerBridge."""
    contexts: Contexts
    hook_names: list[str]
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    block_tokens: int = BLOCK
    held: tuple[int, dict[str, Float[Tensor, "token d_in"]]] | None = None
    """The last block computed, and its index."""
    moments: dict[int, dict[str, Activations]] = field(default_factory=dict)
    """Of so many first tokens, at each hook point: empty, with the moments of these."""
    null_sources: dict[tuple[str, Fit, int], tuple[Callable, Activations]] = field(default_factory=dict)
    """Of each hook point and null source, fitted to so many first tokens: what draws its tokens, and the moments of as many."""

    def __post_init__(self):
        order = np.random.default_rng(0).permutation(len(self.contexts.tokens))
        before = np.cumsum(self.contexts.is_text[order].sum(1))
        count = int(np.searchsorted(before, self.tokens)) + 1
        block = (before[:count] - 1) // self.block_tokens  # of the context's last token
        self.rows = np.split(order[:count], np.flatnonzero(np.diff(block)) + 1)
        self.sizes = [int(self.contexts.is_text[rows].sum()) for rows in self.rows]

    def site(self, hook_name: str, tokens: int) -> "Streamed":
        """The activations at one hook point, under the normalisation of the first `tokens`, or the first block where it has fewer:
        whoever else reads the stream plays no part."""
        return Streamed(self.bridge.cfg.d_model, self.sizes, partial(self._block, hook_name, min(tokens, self.sizes[0])))

    def drawn(self, hook_name: str, fit: Fit, tokens: int) -> "Streamed":
        """Tokens of a null source, fitted to as many of the site (`sources.Source.fit`), and under the normalisation of as many."""
        return Streamed(self.bridge.cfg.d_model, self.sizes, partial(self._drawn, hook_name, fit, min(tokens, self.sizes[0])))

    def _block(self, hook_name: str, tokens: int, index: int) -> Activations:
        if tokens not in self.moments:
            computed = {hook: Activations.of(x[:tokens]) for hook, x in self._compute(0).items()}
            self.moments[tokens] = {hook: of.with_data(of.data.new_empty(0, of.d_in)) for hook, of in computed.items()}
        return self.moments[tokens][hook_name].with_data(self._compute(index)[hook_name])

    def _drawn(self, hook_name: str, fit: Fit, tokens: int, index: int) -> Activations:
        if (hook_name, fit, tokens) not in self.null_sources:
            draw = fit(self._block(hook_name, tokens, 0).first(tokens), self.ids(0)[:tokens])
            first = Activations.of(self._draw(draw, hook_name, 0)[:tokens])
            self.null_sources[hook_name, fit, tokens] = (draw, first.with_data(first.data[:0]))
        draw, moments = self.null_sources[hook_name, fit, tokens]
        return moments.with_data(self._draw(draw, hook_name, index))

    def _draw(self, draw: Callable, hook_name: str, index: int) -> Float[Tensor, "token d_in"]:
        generator = torch.Generator().manual_seed(DRAWN_SEEDS + index)
        return draw(self._compute(index)[hook_name], self.ids(index), generator).to(self.dtype)

    def ids(self, index: int) -> Int[Tensor, "token"]:
        """The tokens of a block."""
        rows = self.rows[index]
        return torch.from_numpy(self.contexts.tokens[rows][self.contexts.is_text[rows]]).long()

    def _compute(self, index: int) -> dict[str, Float[Tensor, "token d_in"]]:
        if self.held is None or self.held[0] != index:
            self.held = None  # room for the next one
            rows = self.rows[index]
            parts = list(forward_all(self.bridge, self.contexts, rows, self.hook_names))
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
