"""One place in a language model: what the model computes there, and what it predicts from something else in its place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.language.activations import layer_of

TOLERANCE = 1e-4  # of logits, beside one unit in the last place of each
CHUNK = 512  # positions whose logits are held at a time: a whole vocabulary each, they stay in the processor's cache


class Site:
    """A hook point of a model, for many predictions from the same text that differ there only.

    Behind a block of the residual stream, what comes before need not be computed again: the rest of the model goes on from the
    activations. Whether it then predicts what the whole model does is tried on the first text; where it does not, as in models that
    transform their logits, and at other hook points, the whole model runs with the activations written by the hook.

    The trial is strict in every dtype: a right continuation does the same operations on the same numbers, so it gives the same bits
    or all but the last, while a wrong one may differ by little on one text and by much on the next. Where a right one fails,
    time is lost and no number is wrong.
    """

    def __init__(self, bridge, hook_name: str):
        self.bridge, self.hook_name = bridge, hook_name
        self._ids: Int[Tensor, "context position"] | None = None
        behind_a_block = hook_name.endswith("hook_resid_post")
        self._rest = bridge.blocks[(layer_of(hook_name) or 0) + 1 :] if behind_a_block else []
        self._inputs: tuple[tuple, dict] = ((), {})
        self._resumes: bool | None = None if behind_a_block else False

    def read(
        self, ids: Int[Tensor, "context position"]
    ) -> tuple[Float[Tensor, "context position d_in"], Float[Tensor, "context position vocabulary"]]:
        """The activations of a text at the site, and the model's logits."""
        self._ids, at_site = ids, []
        handles = [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in self._rest[:1]]
        try:
            logits = self._run(lambda value, hook: at_site.append(value.clone()))
        finally:
            for handle in handles:
                handle.remove()
        if self._resumes is None:
            self._resumes = self._tried(at_site[0], logits)
        return at_site[0], logits

    def predict(
        self, value: Float[Tensor, "context position d_in"], chosen: Bool[Tensor, "context position"]
    ) -> Iterator[Float[Tensor, "row vocabulary"]]:
        """Logits at the chosen positions of the text read last, with `value` at the site: `CHUNK` of them at a time."""
        if self._resumes:
            return map(self.bridge.unembed, self._go_on(value)[chosen].split(CHUNK))
        return iter(self._run(lambda _, hook: value)[chosen].split(CHUNK))

    def _run(self, hook: Callable) -> Tensor:
        return self.bridge.run_with_hooks(self._ids, fwd_hooks=[(self.hook_name, hook)], use_cache=False)

    def _keep(self, block, arguments: tuple, options: dict) -> None:
        """What blocks get beside the residual stream: masks and the positions' embeddings."""
        self._inputs = arguments[1:], {name: value for name, value in options.items() if name != "hidden_states"}

    def _go_on(self, value: Tensor) -> Float[Tensor, "context position d_model"]:
        """What the rest of the model makes of `value`, before the unembedding."""
        arguments, options = self._inputs
        for block in self._rest:
            out = block(value, *arguments, **options)
            value = out[0] if isinstance(out, tuple) else out
        return self.bridge.ln_final(value)

    def _tried(self, value: Tensor, logits: Tensor) -> bool:
        try:
            continued = self.bridge.unembed(self._go_on(value))
            return torch.allclose(continued, logits, atol=TOLERANCE, rtol=torch.finfo(logits.dtype).eps)
        except (AttributeError, RuntimeError, TypeError):  # blocks of this architecture want something else
            return False
