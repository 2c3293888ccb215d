"""The stability of SAEs that already exist, in files of any library or in memory (`sae-stability stability`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.matching import BANDS, STABLE, UNSTABLE, Stability, assign, stability
from sae_stability.methods.dictionary import Dictionary
from sae_stability.saes import formats

if TYPE_CHECKING:
    from sae_stability.language.corpus import Contexts

ENOUGH = 0.05  # seeds are enough where the latent shares of the bands are known within this


@dataclass(frozen=True)
class Firings:
    """How often the features of each SAE fire on a model's activations."""

    counts: Int[Tensor, "sae d_sae"]
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """What SAEs have in common. Narrower ones are filled up with dead features to the width of the widest."""

    names: list[str]
    """A short and unique name of each SAE: from its path, or its position where it came as a dictionary."""
    saes: list[Dictionary]
    found: Stability
    firings: Firings | None

    @property
    def d_in(self) -> int:
        return self.saes[0].directions.shape[1]

    def table(self) -> pd.DataFrame:
        """One row per feature: its stability, and whose it is most like in every other SAE."""
        found, rows = self.found, []
        low, high = found.interval
        for s, (name, sae) in enumerate(zip(self.names, self.saes, strict=True)):
            own = slice(0, len(sae.directions))
            columns = {
                "sae": name,
                "feature": np.arange(len(sae.directions)),
                "alive": found.alive[s, own].numpy(),
                "norm": sae.directions.norm(dim=1).numpy(),
                "stability": found.probability[s, own].numpy(),
                "stability_low": np.where(found.alive[s, own], low[s, own], np.nan),
                "stability_high": np.where(found.alive[s, own], high[s, own], np.nan),
                "matches": found.counts[s, own].numpy(),
                "trials": found.trials,
                "band": np.array([*BANDS, "dead"])[found.band[s, own]],
                "ambiguous": found.ambiguous[s, :, own].sum(0).numpy(),
            }
            if self.firings is not None:
                columns["frequency"] = (self.firings.counts[s, own] / self.firings.tokens).numpy()
            for t, other in enumerate(self.names):
                columns[f"cosine to {other}"] = found.best_cosine[s, t, own].numpy()
                columns[f"partner in {other}"] = found.partner[s, t, own].numpy()
            rows.append(pd.DataFrame(columns))
        return pd.concat(rows, ignore_index=True)

    def mcc(self) -> float:
        """The mean cosine of one-to-one pairings of live features (Song et al., arXiv:2505.20254), over all pairs of SAEs."""
        alive = self.found.alive
        live = [sae.directions[alive[s, : len(sae.directions)]] for s, sae in enumerate(self.saes)]
        pairs = list(combinations(range(len(live)), 2))
        return float(np.mean([assign(live[s], live[t]).mean for s, t in tqdm(pairs, "pairing", disable=None, leave=False)]))

    def chance(self) -> float:
        """Mean stability of random directions with the second moments of each SAE's own: what covariance alone brings."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.zeros(*self.found.alive.shape, self.d_in)
        for s, sae in enumerate(self.saes):
            directions = F.normalize(sae.directions, dim=1)
            with threads.single():
                variances, axes = torch.linalg.eigh(directions.T.double() @ directions.double() / len(directions))
            root = (axes * variances.clamp(min=0).sqrt()).T.float()
            drawn[s, : len(directions)] = torch.randn(directions.shape, generator=generator) @ root
        return stability(drawn, self.found.threshold, self.found.alive).mean().value

    def summary(self) -> str:
        """The finding in a few lines."""
        found, trials = self.found, self.found.trials
        mean, shares = found.mean(), found.shares()
        widths = sorted({len(sae.directions) for sae in self.saes})
        told_widths = " and ".join(f"{width:,}" for width in widths)
        lines = [
            f"{len(self.saes)} SAEs of {told_widths} features, d_in {self.d_in}; a match is a cosine of {found.threshold:g}",
            f"mean stability   {mean:.3f}; random directions with the same second moments: {self.chance():.3f}",
            f"stable           {shares['stable']:.3f}  of the live features, in {STABLE:.0%} or more of the other SAEs",
            f"intermediate     {shares['intermediate']:.3f}",
            f"unstable         {shares['unstable']:.3f}  in {UNSTABLE:.0%} or fewer",
            f"ambiguous        {found.ambiguous_share().value:.3f}  of the matches: the runner-up matches too, or it is not mutual",
            f"one-to-one       {self.mcc():.3f}  mean cosine of the best pairing (MCC)",
            f"seeds            {self._enough(trials + 1)}",
        ]
        if len(widths) > 1:
            lines.append(
                "widths differ    features of a wide SAE find fewer partners in a narrow one; compare equal widths where you can"
            )
        if self.firings is None:
            lines.append(
                "dead features    not told apart, and rarely a match: they lower the stability. --model and --corpus find them"
            )
        else:
            lines.append(f"dead features    {self._dead()} never fire on {self.firings.tokens:,} tokens, and are left out")
        return "\n".join(lines)

    def _dead(self) -> int:
        features = sum(len(sae.directions) for sae in self.saes)
        return features - int(self.found.alive.sum())

    def _enough(self, seeds: int) -> str:
        if seeds < 3:
            return "too few: intervals need three or more"
        width = max((interval.high - interval.low) / 2 for interval in self.found.latent_shares().values())
        verdict = "enough" if width <= ENOUGH else "too few"
        return f"{verdict}: the shares of truly stable and unstable features are known within {width:.3f} ({ENOUGH:g} is asked)"


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

    def count(self, saes: list[Dictionary], d_sae: int) -> Firings:
        """Count on how many of about `tokens` held-out tokens each feature fires.

        Where the held-out text has fewer tokens, all of it is read. Raises `UserError` for an unknown model, hook or text, a text
        too short, one whose activations the SAEs don't fit, and SAEs that can't encode.
        """
        counts, seen = torch.zeros(len(saes), d_sae, dtype=torch.int64), 0
        for x in self.activations(saes, "firings"):
            seen += len(x)
            for of_sae, sae in zip(counts, saes, strict=True):
                of_sae += torch.bincount(sae.codes(x).fired(), minlength=d_sae)
        return Firings(counts, seen)

    def activations(self, saes: Sequence[Dictionary], described: str) -> Iterator[Float[Tensor, "token d_in"]]:
        """The activations of about `tokens` held-out tokens, batch by batch, in float32.

        Raises `UserError` as `count` does: the SAEs say which d_in it must have.
        """
        from sae_stability.language import models
        from sae_stability.language.activations import BATCH, forward

        bridge = models.load(self.model, device=self.device, dtype=self.model_dtype)
        models.check_hook(bridge, self.hook_name)
        contexts = self._contexts(bridge)
        count = contexts.holding(self.tokens)
        for start in tqdm(range(0, count, BATCH), described, unit="batch", disable=None):
            x = forward(bridge, contexts, slice(start, min(start + BATCH, count)), [self.hook_name])[self.hook_name].float()
            d_in = saes[0].directions.shape[1]
            if x.shape[1] != d_in:
                raise UserError(f"hook_name: {self.hook_name} has d_in {x.shape[1]}, the SAEs have {d_in}; name their own site")
            yield x

    def _contexts(self, bridge) -> "Contexts":
        """Contexts of held-out documents: as many documents as it takes, since a corpus can be far longer."""
        from sae_stability.language import corpus, models

        wanted = corpus.CHARACTERS_A_TOKEN * self.tokens
        held_out = corpus.load(self.corpus, characters=round(wanted / corpus.EVALUATION_SHARE)).evaluation
        read = np.cumsum([len(document) for document in held_out])
        length = models.context_length(bridge, None)
        contexts = corpus.pack(held_out[: int(np.searchsorted(read, wanted)) + 1], bridge.tokenizer, length)
        if not len(contexts.tokens):
            raise UserError(
                f"corpus: the held-out documents of {self.corpus} fill no context of {length} tokens; give a longer text"
            )
        return contexts


def compare(given: Sequence[Path | str | Dictionary], threshold: float = 0.7, site: Site | None = None) -> Comparison:
    """Compare the directions of SAEs, from files or in memory.

    With a `site`, features that never fire there are dead and take no part.
    Raises `UserError` for fewer than two SAEs, one given twice, different d_in, signed codes, and for files that `formats.load`
    refuses.
    """
    if len(given) < 2:
        raise UserError("PATH: stability compares SAEs; give two or more, of the same training with other seeds")
    sources = [Path(source) if isinstance(source, Path | str) else source for source in given]
    if len({source.resolve() if isinstance(source, Path) else id(source) for source in sources}) < len(sources):
        raise UserError("PATH: an SAE is given twice; it would match itself")
    saes = [formats.load(source) if isinstance(source, Path) else source for source in sources]
    names = _names(sources)
    for name, sae in zip(names, saes, strict=True):
        if sae.signed:
            raise UserError(f"{name}: its codes have a sign, so its directions match by |cosine|; give dictionaries without one")
        if sae.directions.shape[1] != saes[0].directions.shape[1]:
            d_in, first = sae.directions.shape[1], saes[0].directions.shape[1]
            raise UserError(f"{name}: d_in {d_in}, but {first} in {names[0]}; compare SAEs of one site")
    W_dec = torch.zeros(len(saes), max(len(sae.directions) for sae in saes), saes[0].directions.shape[1])
    for s, sae in enumerate(saes):
        W_dec[s, : len(sae.directions)] = sae.directions
    firings = None if site is None else site.count(saes, W_dec.shape[1])
    alive = None if firings is None else firings.counts > 0
    return Comparison(names, saes, stability(W_dec, threshold, alive), firings)


def _names(sources: Sequence[Path | Dictionary]) -> list[str]:
    """The last parts of the paths that tell them apart; dictionaries have their position."""
    parts = [
        source.resolve().parts if isinstance(source, Path) else (f"dictionary {position}",)
        for position, source in enumerate(sources)
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
