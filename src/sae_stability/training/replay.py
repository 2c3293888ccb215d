"""Steps on a CUDA device that are recorded once and replayed: the sixty kernels of a step run faster than a program launches them.

What is recorded works on the same memory whenever it is replayed, so all that differs from step to step lies here.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Buffers:
    """The inputs of some steps in a row, and what these measure. All seeds of a training use it in turn."""

    def __init__(self, steps: int, batch: int, d_in: int, device: torch.device):
        self.x = torch.empty(steps, batch, d_in, device=device)
        self.rates = torch.zeros(steps, device=device)
        self.rate = torch.zeros((), device=device)
        """Adam's, of the step that is taken."""
        self.measured = torch.zeros(steps, 3, dtype=torch.float64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.pool = torch.cuda.graph_pool_handle()

    def take(
        self,
        first: int,
        batches: Float[Tensor, "token d_in"],
        rates: Sequence[float],
        one_step: Callable[[Float[Tensor, "batch d_in"], Tensor], Float[Tensor, "3"]],
        graph: torch.cuda.CUDAGraph | None,
    ) -> Float[Tensor, "step 3"]:
        """Take a step for each rate, `first` and those behind it, anew or as they are recorded; what they measured.

        `one_step` takes a batch and the step's number. Nothing here waits for the device.
        """
        self.x.flatten(0, 1)[: len(batches)].copy_(batches)
        self.rates[: len(rates)].copy_(torch.tensor(rates).pin_memory(), non_blocking=True)
        self.step.fill_(first)
        self.place.zero_()
        for _ in rates:
            if graph is None:
                self._one(one_step)
            else:
                graph.replay()
        return self.measured[: len(rates)].clone()

    def record(self, one_step: Callable[[Float[Tensor, "batch d_in"], Tensor], Float[Tensor, "3"]]) -> torch.cuda.CUDAGraph:
        """A step that was taken before, so that all of its kernels are loaded; recording takes none."""
        graph, current, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            # Not by `torch.cuda.graph`, which collects garbage each time.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._one(one_step)
            graph.capture_end()
        current.wait_stream(aside)
        return graph

    def _one(self, one_step: Callable[[Float[Tensor, "batch d_in"], Tensor], Float[Tensor, "3"]]) -> None:
        self.rate.copy_(self.rates.index_select(0, self.place)[0])
        measured = one_step(self.x.index_select(0, self.place)[0], self.step)
        self.measured.index_copy_(0, self.place, measured[None])
        self.place += 1
        self.step += 1
