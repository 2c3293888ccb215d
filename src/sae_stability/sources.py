"""What SAEs are trained on: the activations of a model at a site, and what they are compared with, one class each.

Null sources are made from a site's own activations, or from a model like it: the same training on each says what would have been
found without what the source leaves out (PAPER, Nulls). To add one: a class here, its name among `Nulls` in `study.py`, and how it
is drawn in `figures/style.py`.
"""

from abc import ABC
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.language.activations import CHUNK, Activations, Writer, gaussian, whitening

SMALLEST_VARIANCE = 1e-6  # of the mean one: what lies below is rounding

Draw = Callable[[Float[Tensor, "token d_in"], Int[Tensor, "token"], torch.Generator], Float[Tensor, "token d_in"]]
"""Makes tokens of a null source from as many real ones: their activations and their ids in the vocabulary."""

_KINDS: dict[str, type["Source"]] = {}


def source(kind: str) -> type["Source"]:
    """The class of a source, by what tables call it: `real`, or the name of a null."""
    return _KINDS[kind]


class Source(ABC):
    """What SAEs are trained on, as a function of a site of a language model."""

    kind: ClassVar[str]
    """What tables call it."""
    shuffled_weights: ClassVar[bool] = False
    """Whether the model's weights are shuffled before it reads the text."""
    drawn: ClassVar[bool] = False
    """Whether it is made of the activations of the model (`fit`), and not what a model computes."""

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    @staticmethod
    def fit(real: Activations, tokens: Int[Tensor, "token"]) -> Draw:
        """From real activations, whose rows have the ids `tokens`, what makes tokens of this source."""
        raise TypeError("this source is what a model computes, and is not drawn")


class Site(Source):
    """The activations themselves."""

    kind = "real"


class Surrogate(Source):
    """Gaussian data with the activations' mean and covariance: no features to find. The primary null."""

    kind = "surrogate"
    drawn = True

    @staticmethod
    def fit(real: Activations, tokens: Int[Tensor, "token"]) -> Draw:
        draw = gaussian(real)
        return lambda x, ids, generator: draw(len(x), generator)


class ShuffledWeights(Source):
    """The activations of a copy of the model whose weights are shuffled: what its architecture and its tokens bring."""

    kind = "randomised"
    shuffled_weights = True


class Whitened(Source):
    """The activations with the identity as their covariance. Subspaces of whitened noise overlap by chance alone, r / d."""

    kind = "whitened"
    drawn = True

    @staticmethod
    def fit(real: Activations, tokens: Int[Tensor, "token"]) -> Draw:
        transform, mean = whitening(real.covariance, SMALLEST_VARIANCE), real.mean

        def draw(x, ids, generator):
            with threads.single():
                return (x.float() - mean) @ transform

        return draw


class TokenConditional(Source):
    """Gaussian data around each token's mean: what features of single tokens bring, and nothing else."""

    kind = "token-conditional"
    drawn = True

    FEWEST: ClassVar[int] = 10
    """Occurrences that give a token a mean of its own; rarer ones share one."""

    @classmethod
    def fit(cls, real: Activations, tokens: Int[Tensor, "token"]) -> Draw:
        tokens = tokens[: len(real)]
        vocabulary = int(tokens.max()) + 1
        count = torch.bincount(tokens, minlength=vocabulary)
        group = torch.where(count >= cls.FEWEST, torch.arange(1, vocabulary + 1), 0)  # 0: the rare ones
        sums = torch.zeros(vocabulary + 1, real.d_in, dtype=torch.float64)
        for start in range(0, len(real), CHUNK):
            rows = slice(start, start + CHUNK)
            sums.index_add_(0, group[tokens[rows]], real.data[rows].double())
        sizes = torch.bincount(group[tokens], minlength=vocabulary + 1)
        means = sums / sizes.clamp(min=1)[:, None]
        with threads.single():
            # The covariance is what tokens' means vary by and what varies around them (law of total variance).
            apart = (means - real.mean.double())[sizes > 0] * (sizes[sizes > 0].double() / len(real)).sqrt()[:, None]
            within = gaussian(real.with_moments(torch.zeros(real.d_in), (real.covariance.double() - apart.T @ apart).float()))
        means = means.float()

        def draw(x, ids, generator):
            known = torch.where(ids < vocabulary, ids, 0)  # a token that the text does not hold counts as rare
            return within(len(x), generator) + means[torch.where(ids < vocabulary, group[known], 0)]

        return draw


def write_drawn(draw: Draw, real: Activations, tokens: Int[Tensor, "token"], path: Path, seed: int, described: str) -> None:
    """Write as many tokens of a null source as `real` has; rows of `real` have the ids `tokens`."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Iterator[Float[Tensor, "token d_in"]]:
        for rows, ids in zip(real.data.split(CHUNK), tokens[: len(real)].split(CHUNK), strict=True):
            yield draw(rows, ids, generator)

    chunks = -(-len(real) // CHUNK)
    # One thread for each of both, throughout: who draws must not give threads back to who writes.
    with threads.single(), Writer(path, real.d_in, real.data.dtype) as writer:
        for x in tqdm(threads.ahead(drawn()), described, total=chunks, unit="chunk", disable=None):
            writer.write(x)
