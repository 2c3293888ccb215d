"""What SAEs have in common, and what makes that doubtful."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sae_stability import threads
from sae_stability.errors import UserError
from sae_stability.existing.site import Firings, Site
from sae_stability.matching import BANDS, STABLE, UNSTABLE, Stability, assign, stability
from sae_stability.matching.pairs import reaches
from sae_stability.methods.dictionary import Dictionary
from sae_stability.saes import formats
from sae_stability.saes.reading import About, Loaded
from sae_stability.saes.sae import SAE
from sae_stability.statistics import Interval
from sae_stability.study import model_name

ENOUGH = 0.05  # seeds are enough where the latent shares of the bands are known within this
FEW_TOKENS = 10_000  # below which a feature that is not dead may well not fire
FEW_FEATURES = 20  # live ones of an SAE, below which shares of them say little


@dataclass(frozen=True)
class Comparison:
    """What SAEs have in common. Narrower ones are filled up with dead features to the width of the widest."""

    names: list[str]
    """A short and unique name of each SAE: from its path, or its position where it came as a dictionary."""
    saes: list[Dictionary]
    found: Stability
    firings: Firings | None
    notes: dict[str, str]
    """What a reader should know before trusting the numbers: a word or two, and a sentence."""

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
                "norm": sae.directions.detach().norm(dim=1).cpu().numpy(),
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

    @cached_property
    def mcc(self) -> float:
        """The mean cosine of one-to-one pairings of live features (Song et al., arXiv:2505.20254), over all pairs of SAEs."""
        alive = self.found.alive
        live = [sae.directions[alive[s, : len(sae.directions)]] for s, sae in enumerate(self.saes)]
        pairs = list(combinations(range(len(live)), 2))
        return float(np.mean([assign(live[s], live[t]).mean for s, t in tqdm(pairs, "pairing", disable=None, leave=False)]))

    @cached_property
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
        features = "all features" if self.firings is None else "the live features"
        lines = [
            f"{len(self.saes)} SAEs of {told_widths} features, d_in {self.d_in}; a match is a cosine of {found.threshold:g}",
            f"mean stability   {mean:.3f}; random directions with the same second moments: {self.chance:.3f}",
            f"stable           {shares['stable']:.3f}  of {features}, in {STABLE:.0%} or more of the other SAEs",
            f"intermediate     {shares['intermediate']:.3f}",
            f"unstable         {shares['unstable']:.3f}  in {UNSTABLE:.0%} or fewer",
            f"ambiguous        {found.ambiguous_share().value:.3f}  of the matches: the runner-up matches too, or it is not mutual",
            f"one-to-one       {self.mcc:.3f}  mean cosine of the best pairing (MCC)",
            f"seeds            {self._enough(trials + 1)}",
        ]
        if self.firings is None:
            lines.append(f"dead features    not told apart, and rarely a match: they lower the stability{self._mend}")
        else:
            lines.append(f"dead features    {self._dead()} never fire on {self.firings.tokens:,} tokens, and are left out")
            lines.append(f"text             {self.firings.text}")
        return "\n".join(lines + [f"{about:<17}{told}" for about, told in self.notes.items()])

    @property
    def _mend(self) -> str:
        """How to find the dead features, where nothing else stands in the way."""
        return "" if "directions only" in self.notes else "; --model, --corpus and --hook-name together find them"

    def _dead(self) -> int:
        features = sum(len(sae.directions) for sae in self.saes)
        return features - int(self.found.alive.sum())

    def _enough(self, seeds: int) -> str:
        live = int(self.found.alive.sum(1).min())
        if seeds < 3:
            return "too few: intervals need three or more"
        if live < FEW_FEATURES:
            return f"not known: an SAE has {live} live features, too few to speak of shares"
        if not self.found.counts.any():
            return "not known: no feature comes back in any other SAE; are they of one site?"
        width = max((interval.high - interval.low) / 2 for interval in self.latent_shares.values())
        if not width >= 0:  # NaN
            return "not known: too little comes back to fit how often features do"
        verdict = "enough" if width <= ENOUGH else "too few"
        return f"{verdict}: the shares of truly stable and unstable features are known within {width:.3f} ({ENOUGH:g} is asked)"

    @cached_property
    def latent_shares(self) -> dict[str, Interval]:
        """The shares of features that truly are stable, and unstable, by a beta-binomial fit."""
        return self.found.latent_shares()


def compare(given: Iterable[Path | str | Dictionary], threshold: float = 0.7, site: Site | None = None) -> Comparison:
    """Compare the directions of SAEs, from files or in memory.

    With a `site`, features that never fire there are dead and take no part.
    Raises `UserError` for fewer than two SAEs, one given twice, different d_in, signed codes, and for files that `formats.load`
    refuses.
    """
    if isinstance(given, str | Path):
        raise UserError(f"PATH: {given} is one path; give a list of two or more")
    given = list(given)
    few = UserError("PATH: stability compares SAEs; give two or more, of the same training with other seeds")
    if not given:
        raise few
    if not 0 < threshold <= 1:
        raise UserError(f"threshold: {threshold:g} is no cosine in (0, 1]; the usual one is 0.7")
    sources = [Path(source) if isinstance(source, Path | str) else source for source in given]
    if len({source.resolve() if isinstance(source, Path) else id(source) for source in sources}) < len(sources):
        raise UserError("PATH: an SAE is given twice; it would match itself")
    named: dict[str, Dictionary] = {}
    for name, source in zip(_names(sources), sources, strict=True):
        found = formats.load_all(source) if isinstance(source, Path) else {"": source}
        named |= {f"{name} {which}".strip(): sae for which, sae in found.items()}
    if len(named) < 2:
        raise few
    names, saes = list(named), list(named.values())
    _check(named)
    abouts = {name: sae.about for name, sae in named.items() if isinstance(sae, Loaded) and sae.about is not None}
    without = {name: about.encoder for name, about in abouts.items() if about.encoder is not None}
    W_dec = torch.zeros(len(saes), max(len(sae.directions) for sae in saes), saes[0].directions.shape[1])
    for s, sae in enumerate(saes):
        W_dec[s, : len(sae.directions)] = sae.directions.detach()
    firings = None
    if site is not None and not without:
        firings = site.count(saes, W_dec.shape[1], centred(saes))
        for name, counts in zip(names, firings.counts, strict=True):
            if not counts.any():
                raise UserError(
                    f"{name}: none of its features fires on {firings.tokens:,} tokens of {site.hook_name}; give the model, site "
                    "and text that it is of, or leave --model out"
                )
    alive = None if firings is None else firings.counts > 0
    matched = stability(W_dec, threshold, alive)
    notes = _notes(named, abouts, without, site, firings) | _same(names, matched)
    return Comparison(names, saes, matched, firings, notes)


def _check(named: dict[str, Dictionary]) -> None:
    """Raise `UserError` for dictionaries that can't be compared."""
    first = next(iter(named))
    d_in, seen = named[first].directions.shape[1], dict[tuple, list[str]]()
    for name, sae in named.items():
        if sae.signed:
            raise UserError(f"{name}: its codes have a sign, so its directions match by |cosine|; give dictionaries without one")
        if sae.directions.shape[1] != d_in:
            raise UserError(f"{name}: d_in {sae.directions.shape[1]}, but {d_in} in {first}; compare SAEs of one site")
        alike = seen.setdefault((*sae.directions.shape, float(sae.directions.sum())), [])
        for other in alike:
            if torch.equal(named[other].directions, sae.directions):
                raise UserError(f"{other} and {name} have the same directions bit for bit; an SAE matches itself, so give it once")
        alike.append(name)


def _same(names: list[str], matched: Stability) -> dict[str, str]:
    """A note on two SAEs of which each has all directions of the other: one SAE with its features in another order, or rescaled."""
    for pair in combinations(range(len(names)), 2):
        if all(reaches(matched.best_cosine[s, t, matched.alive[s]], 1.0).all() for s, t in (pair, pair[::-1])):
            one, other = (names[each] for each in pair)
            return {
                "same directions": f"{one} and {other} have the same ones, in another order or of another length: is it one SAE?"
            }
    return {}


def centred(saes: Sequence[Dictionary]) -> bool:
    """Whether SAEs are of a model whose weights were centred, by what their files say.

    Raises `UserError` where some are and others are not.
    """
    told = {str(sae.about.path): sae.about.centred for sae in saes if isinstance(sae, Loaded) and sae.about is not None}
    if len(set(told.values())) > 1:
        name = next(name for name, is_centred in told.items() if is_centred)
        raise UserError(
            f"{name}: it is of a model with centred weights (center_writing_weights), and others are not; take them without --model"
        )
    return any(told.values())


def _notes(
    named: dict[str, Dictionary], abouts: dict[str, About], without: dict[str, str], site: Site | None, firings: Firings | None
) -> dict[str, str]:
    """What makes a comparison doubtful, by a word or two each."""
    notes = {}
    widths = {len(sae.directions) for sae in named.values()}
    if len(widths) > 1:
        notes["widths differ"] = "features of a wide SAE find fewer partners in a narrow one; compare equal widths where you can"
    narrow = [name for name, sae in named.items() if len(sae.directions) < sae.directions.shape[1]]
    if narrow:
        notes["few features"] = f"{narrow[0]} has fewer than d_in; if its decoder lies on its side, save it as [d_sae, d_in]"
    recipes = {_recipe(sae): name for name, sae in named.items() if isinstance(sae, SAE) and sae.variant is not None}
    if len(recipes) > 1:
        told = "; ".join(f"{name}: {recipe}" for recipe, name in list(recipes.items())[:3])
        notes["recipes differ"] = f"{told}: what does not come back may owe it to the recipe, and not to the seed"
    differing = {name: about.sizes for name, about in abouts.items() if about.sizes}
    if differing:
        name, told = next(iter(differing.items()))
        notes["sizes differ"] = f"{name}: {told}; what is compared are the weights"
    places = {_place(about): name for name, about in abouts.items() if about.model or about.hook_name}
    if len(places) > 1:
        told = "; ".join(f"{name}: {place}" for place, name in list(places.items())[:3])
        notes["sites differ"] = f"by what their files say ({told}): features of other sites need not match"
    if site is not None:
        given = About(Path(), site.model, site.hook_name)
        others = [f"{name} is of {_place(about)} by its file" for name, about in abouts.items() if _elsewhere(about, given)]
        if others:
            notes["another site"] = f"{others[0]}, and firings are those at {_place(given)}"
    if without:
        name, reason = next(iter(without.items()))
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        notes["directions only"] = f"{name}{more}: {reason}{'; firings are not counted' if site is not None else ''}"
    if firings is not None and centred(list(named.values())):
        notes["centred"] = "activations are read as of a model with centred weights, which the files ask for"
    if firings is not None and firings.tokens < FEW_TOKENS:
        notes["little text"] = f"{firings.tokens:,} tokens: features that fire rarely look dead; give a longer text"
    return notes


def _recipe(sae: SAE) -> str:
    """The variant of an SAE, and its k where it has one."""
    return f"{sae.variant}, k {sae.k}" if sae.k else str(sae.variant)


def _place(about: About) -> str:
    """The site of a model, as far as it is told: what a block writes is what the next one reads."""
    hook = about.hook_name or "some site"
    read = re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook)
    hook = f"blocks.{int(read[1]) - 1}.hook_resid_post" if read else hook
    return " of ".join(part for part in (hook, about.model and model_name(about.model)) if part)


def _elsewhere(about: About, given: About) -> bool:
    """Whether a file names another site or model than what was given. Of a model the last part of its name counts; sites that
    another library names can't be compared."""
    comparable = about.hook_name is not None and about.hook_name.startswith(("blocks.", "hook_", "ln_final"))
    hooks = comparable and _place(replace(about, model=None)) != _place(replace(given, model=None))
    models = about.model and given.model and model_name(about.model).lower() != model_name(given.model).lower()
    return bool(hooks or models)


def _names(sources: Sequence[Path | Dictionary]) -> list[str]:
    """The last parts of the paths that tell them apart; dictionaries have their position."""
    parts = [
        Path(os.path.abspath(source)).parts if isinstance(source, Path) else (f"dictionary {position}",)
        for position, source in enumerate(sources)
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
