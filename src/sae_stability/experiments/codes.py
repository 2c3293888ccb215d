"""What the SAEs of a cell make of held-out text: encoded once, for all experiments that read it one after another."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from sae_stability.evaluation import Encoded
from sae_stability.experiments import ensembles, texts
from sae_stability.experiments.experiment import Results

CODE_TOKENS = 100_000
"""Held-out tokens on which activations are correlated, and features removed."""
KEPT = 2
"""Ensembles whose codes stay in memory: that of a cell and its surrogate's."""


def encoded(results: Results, kind: str = "real") -> Encoded:
    """The first `CODE_TOKENS` held-out tokens, and the codes that every seed gives them: not to be changed."""
    folders = (*results.folders(f"ensembles/{kind}"), results.folder(f"activations/{kind}"))
    return _encoded(_Asked(tuple(folders), results.cell.evaluation_tokens, results, kind))


@dataclass(frozen=True)
class _Asked:
    """What is encoded, by where it stands: names there hold the keys of their contents."""

    folders: tuple[Path, ...]
    tokens: int
    results: Results = field(compare=False)
    kind: str = field(compare=False)


@lru_cache(maxsize=KEPT)
def _encoded(asked: _Asked) -> Encoded:
    held_out = texts.activations(asked.results, "evaluation", asked.kind).first(CODE_TOKENS)
    return Encoded.of(ensembles.ensemble(asked.results, asked.kind), held_out)
