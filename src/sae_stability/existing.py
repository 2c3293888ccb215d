"""The stability of SAEs that already exist, from this project or another library (`sae-stability stability`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.matching import BANDS, STABLE, UNSTABLE, Stability, assign, stability
from sae_stability.saes import formats
from sae_stability.saes.sae import SAE

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
    """A short and unique name of each SAE, from its path."""
    saes: list[SAE]
    found: Stability
    firings: Firings | None

    @property
    def d_in(self) -> int:
        return self.saes[0].W_dec.shape[1]

    def table(self) -> pd.DataFrame:
        """One row per feature: its stability, and whose it is most like in every other SAE."""
        found, rows = self.found, []
        low, high = found.interval
        for s, (name, sae) in enumerate(zip(self.names, self.saes, strict=True)):
            own = slice(0, len(sae.W_dec))
            columns = {
                "sae": name,
                "feature": np.arange(len(sae.W_dec)),
                "alive": found.alive[s, own].numpy(),
                "norm": sae.W_dec.norm(dim=1).numpy(),
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
        live = [sae.W_dec[alive[s, : len(sae.W_dec)]] for s, sae in enumerate(self.saes)]
        pairs = list(combinations(range(len(live)), 2))
        return float(np.mean([assign(live[s], live[t]).mean for s, t in tqdm(pairs, "pairing", disable=None, leave=False)]))

    def chance(self) -> float:
        """Mean stability of random directions with the second moments of each SAE's own: what covariance alone brings."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.zeros(*self.found.alive.shape, self.d_in)
        for s, sae in enumerate(self.saes):
            directions = F.normalize(sae.W_dec, dim=1)
            with threads.single():
                variances, axes = torch.linalg.eigh(directions.T.double() @ directions.double() / len(directions))
            root = (axes * variances.clamp(min=0).sqrt()).T.float()
            drawn[s, : len(directions)] = torch.randn(directions.shape, generator=generator) @ root
        return stability(drawn, self.found.threshold, self.found.alive).mean().value

    def summary(self) -> str:
        """The finding in a few lines."""
        found, trials = self.found, self.found.trials
        mean, shares = found.mean(), found.shares()
        widths = sorted({len(sae.W_dec) for sae in self.saes})
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
        features = sum(len(sae.W_dec) for sae in self.saes)
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

    def count(self, saes: list[SAE], d_sae: int) -> Firings:
        """Count on how many of about `tokens` held-out tokens each feature fires.

        Raises `UserError` for an unknown model, hook or text, one whose activations the SAEs don't fit, and SAEs that can't encode.
        """
        from sae_stability.language import corpus, models
        from sae_stability.language.activations import BATCH, forward

        bridge = models.load(self.model)
        models.check_hook(bridge, self.hook_name)
        text = corpus.load(self.corpus, characters=corpus.CHARACTERS_A_TOKEN * self.tokens)
        contexts = corpus.pack(text.train + text.evaluation, bridge.tokenizer, models.context_length(bridge, None))
        counts, seen = torch.zeros(len(saes), d_sae, dtype=torch.int64), 0
        count = contexts.holding(self.tokens)
        for start in tqdm(range(0, count, BATCH), "firings", unit="batch", disable=None):
            x = forward(bridge, contexts, slice(start, min(start + BATCH, count)), [self.hook_name])[self.hook_name].float()
            d_in = saes[0].W_dec.shape[1]
            if x.shape[1] != d_in:
                raise UserError(f"hook_name: {self.hook_name} has d_in {x.shape[1]}, the SAEs have {d_in}; name their own site")
            seen += len(x)
            for of_sae, sae in zip(counts, saes, strict=True):
                of_sae += torch.bincount(sae.codes(x).fired(), minlength=d_sae)
        return Firings(counts, seen)


def compare(paths: Sequence[Path | str], threshold: float = 0.7, site: Site | None = None) -> Comparison:
    """Load SAEs and compare their decoders. With a `site`, features that never fire there are dead and take no part.

    Raises `UserError` for fewer than two SAEs, one given twice, different d_in, and for files that `formats.load` refuses.
    """
    paths = [Path(path) for path in paths]
    if len(paths) < 2:
        raise UserError("PATH: stability compares SAEs; give two or more, of the same training with other seeds")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("PATH: an SAE is given twice; it would match itself")
    saes = [formats.load(path) for path in paths]
    for path, sae in zip(paths, saes, strict=True):
        if sae.W_dec.shape[1] != saes[0].W_dec.shape[1]:
            raise UserError(
                f"{path}: d_in {sae.W_dec.shape[1]}, but {saes[0].W_dec.shape[1]} in {paths[0]}; compare SAEs of one site"
            )
    W_dec = torch.zeros(len(saes), max(len(sae.W_dec) for sae in saes), saes[0].W_dec.shape[1])
    for s, sae in enumerate(saes):
        W_dec[s, : len(sae.W_dec)] = sae.W_dec
    firings = None if site is None else site.count(saes, W_dec.shape[1])
    alive = None if firings is None else firings.counts > 0
    return Comparison(_names(paths), saes, stability(W_dec, threshold, alive), firings)


def _names(paths: list[Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    for depth in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
