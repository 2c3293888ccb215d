"""How good explanations are, by detection (Paulo et al., arXiv:2410.13928): does an engine that reads the explanation know in which
contexts the feature fires?
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

from sae_stability.explanations.surface import says_surface
from sae_stability.explanations.windows import Task, Window


class LeftOut(Exception):
    """Why an engine could not explain one feature; the next may go well."""


class Said(Protocol):
    """An explanation in words that can be put to the test."""

    @property
    def text(self) -> str: ...

    def detect(self, windows: list[list[str]]) -> list[bool]:
        """Whether the feature fires somewhere in each window of tokens, going by the explanation."""


class Engine(Protocol):
    """What explains features; it sees windows, and not which band a feature is in."""

    @property
    def name(self) -> str: ...

    def explain(self, shown: list[Window]) -> Said | None:
        """What the feature fires on; None where the engine has nothing to say."""


class Reader(Protocol):
    """A language model that reads an explanation."""

    def detect(self, text: str, windows: list[list[str]]) -> list[bool]: ...


@dataclass(frozen=True)
class Described:
    """An explanation that a language model wrote, and reads again to be scored."""

    text: str
    engine: Reader

    def detect(self, windows: list[list[str]]) -> list[bool]:
        return self.engine.detect(self.text, windows)


@dataclass(frozen=True)
class Explanation:
    """An explanation of a feature, and how well it tells where the feature fires."""

    feature: int
    text: str
    surface: bool
    """Whether it speaks of how the text is written, by a written rule."""
    precision: float
    recall: float
    f1: float
    balanced_accuracy: float
    """The mean of recall and of the share of silent windows that are called silent: one half for whoever guesses."""
    scored: int
    """Windows that it was scored on."""

    @property
    def row(self) -> dict:
        return asdict(self)


def explain(engine: Engine, given: Iterable[Task], left_out: dict[int, str] | None = None) -> Iterator[Explanation]:
    """Explain and score features one after another; what an engine has nothing to say of is left out, and what it could not explain
    goes to `left_out`, with the reason."""
    for task in given:
        try:
            said = engine.explain(task.shown) if task.shown else None
            if said is None or not task.scored:
                continue
            found = said.detect([window.tokens for window in task.scored])
        except LeftOut as reason:
            if left_out is not None:
                left_out[task.feature] = str(reason)
            continue
        truth = [window.fires for window in task.scored]
        right = sum(one and other for one, other in zip(found, truth, strict=True))
        precision = right / sum(found) if any(found) else 0.0
        recall = right / sum(truth)
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        silent = len(truth) - sum(truth)
        quiet = sum(not one and not other for one, other in zip(found, truth, strict=True))
        balanced = (recall + quiet / silent) / 2 if silent else math.nan
        yield Explanation(task.feature, said.text, says_surface(said.text), precision, recall, f1, balanced, len(truth))
