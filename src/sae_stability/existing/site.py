"""A site of a language model, on a text of which the features of SAEs can fire."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability.errors import UserError
from sae_stability.methods.dictionary import Dictionary

if TYPE_CHECKING:
    from sae_stability.language.corpus import Contexts, Corpus

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
TO_THE_STREAM = (*STREAM, "hook_attn_out", "hook_mlp_out", "hook_embed", "hook_pos_embed")
"""Last parts of the hook points at which the residual stream stands, or what is written to it."""
LAYER_NORMS = ("LN", "LNPre")  # under which centring the weights that write changes nothing but the mean of what is written


@dataclass(frozen=True)
class Firings:
    """How often the features of each SAE fire on a model's activations."""

    counts: Int[Tensor, "sae d_sae"]
    tokens: int
    text: str
    """What was read, for readers."""


@dataclass(frozen=True)
class Site:
    """A site of a model, and a text on which features can fire there."""

    model: str
    corpus: str
    hook_name: str
    tokens: int
    device: str = "cpu"
    """Where the model runs."""
    model_dtype: torch.dtype = torch.float32
    """In which it computes; the SAEs encode in float32."""

    def count(self, saes: list[Dictionary], d_sae: int, centred: bool = False) -> Firings:
        """Count on how many of about `tokens` held-out tokens each feature fires.

        Where the held-out text has fewer tokens, all of it is read. Raises `UserError` for an unknown model, hook or text, a text
        too short, one whose activations the SAEs don't fit, and SAEs that can't encode.
        """
        counts, seen = torch.zeros(len(saes), d_sae, dtype=torch.int64), 0
        for x in self.activations(saes, "firings", centred):
            seen += len(x)
            for of_sae, sae in zip(counts, saes, strict=True):
                of_sae += torch.bincount(sae.codes(x).fired(), minlength=d_sae)
        return Firings(counts, seen, self.text)

    def activations(
        self, saes: Sequence[Dictionary], described: str, centred: bool = False
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """The activations of about `tokens` held-out tokens, batch by batch, in float32.

        With `centred`, as they are in a model whose weights that write to the residual stream were centred
        (`center_writing_weights`): what stands in the residual stream, or is written to it, less its mean over d_in, where the
        model has layer norms. What is read from it elsewhere is the same.

        Raises `UserError` as `count` does: the SAEs say which d_in it must have.
        """
        from sae_stability.language import models
        from sae_stability.language.activations import BATCH, forward_all
        from sae_stability.language.tokens import check_ids

        bridge = models.load(self.model, device=self.device, dtype=self.model_dtype)
        models.check_hook(bridge, self.hook_name)
        if centred and bridge.cfg.normalization_type not in LAYER_NORMS:
            raise UserError(
                f"model: the SAEs are of {self.model} with centred weights, which only layer norms allow; leave --model out, and "
                "their directions are compared"
            )
        contexts = self._contexts(bridge)
        check_ids(bridge, contexts.tokens)
        centred = centred and self.hook_name.rpartition(".")[2] in TO_THE_STREAM
        rows = np.arange(contexts.holding(self.tokens))
        found = forward_all(bridge, contexts, rows, [self.hook_name])
        for at_site in tqdm(found, described, total=-(-len(rows) // BATCH), unit="batch", disable=None):
            x = at_site[self.hook_name].float()
            d_in = saes[0].directions.shape[1]
            if x.shape[1] != d_in:
                raise UserError(f"hook_name: {self.hook_name} has d_in {x.shape[1]}, the SAEs have {d_in}; name their own site")
            yield x - x.mean(1, keepdim=True) if centred else x

    @property
    def text(self) -> str:
        """What is read, for readers."""
        return self._corpus.told

    @cached_property
    def _corpus(self) -> "Corpus":
        from sae_stability.language import corpus

        wanted = corpus.CHARACTERS_A_TOKEN * self.tokens
        return corpus.load(self.corpus, characters=round(wanted / corpus.EVALUATION_SHARE))

    def _contexts(self, bridge) -> "Contexts":
        """Contexts of held-out documents: as many documents as it takes, since a corpus can be far longer."""
        from sae_stability.language import corpus, models

        wanted = corpus.CHARACTERS_A_TOKEN * self.tokens
        held_out = self._corpus.evaluation
        read = np.cumsum([len(document) for document in held_out])
        length = models.context_length(bridge, None)
        contexts = corpus.pack(held_out[: int(np.searchsorted(read, wanted)) + 1], models.load_tokenizer(self.model), length)
        if not len(contexts.tokens):
            raise UserError(
                f"corpus: the held-out documents of {self.corpus} fill no context of {length} tokens; give a longer text"
            )
        return contexts
