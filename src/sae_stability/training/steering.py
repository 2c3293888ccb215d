"""Finds the coefficient of a sparsity penalty that brings a variant to the wanted L0, on pilot seeds that no ensemble uses.

A controller that moves the coefficient while an SAE trains would give every seed an objective of its own. So pilots train at
coefficients that stay, and the one read off between them is then frozen for all seeds of the recipe.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sae_stability.files import read_json, write_json
from sae_stability.language.activations import Activations, Blocks
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.study import Recipe
from sae_stability.training.shards import Job, train_all
from sae_stability.training.shuffling import ROUNDS, shuffled

PILOT_SEEDS = 1 << 32  # the first of them, beyond those that a study names
LADDER = (0.25, 1.0, 4.0, 16.0)  # coefficients of the first pilots, which read few tokens
SHORT = 4  # these read one token in so many
AROUND = (0.75, 1.0, 1.33)  # times the guess: coefficients of the pilots that read all tokens
ATTEMPTS = 8  # of the latter; more than two where the first guess was far off
BEYOND = 2.0  # times the last coefficient tried, where all L0 lie on one side of the target
NEAR = 1.1  # a pilot's L0 must come as near to the target as this factor
PILOTS = "pilots.json"
ASIDE = 1.4  # how many times more or fewer features fire beside a recipe
MEASURED = 32_768  # training tokens on which a pilot's L0 is measured, at inference


def steer(recipe: Recipe, blocks: Blocks, folder: Path | None, device: torch.device) -> float:
    """The coefficient at which SAEs of `recipe` have L0 = k on `blocks`.

    Short pilots find the order of magnitude, those that read all tokens the rest. Between two pilots, the logarithm
    of L0 is taken to be linear in that of the coefficient.
    """
    if folder is not None and (folder / PILOTS).exists():
        return read_json(folder / PILOTS)["coefficient"]
    few = recipe.model_copy(update={"tokens": max(recipe.batch, recipe.tokens // SHORT), "passes": 1})
    guess = crossing(LADDER, _l0(few, blocks, LADDER, folder and folder / "ladder", device), recipe.k)

    def l0_at(around: Sequence[float]) -> list[float]:
        return _l0(recipe, blocks, around, folder and folder / f"around-{around[0]}", device)

    guess, tried, found = search(l0_at, guess, recipe.k)
    if folder is not None:
        rows = zip(tried, [l0 if math.isfinite(l0) else None for l0 in found], strict=True)  # None: the pilot diverged
        write_json(folder / PILOTS, {"coefficient": guess, "pilots": [{"coefficient": c, "l0": l0} for c, l0 in rows]})
        for trained in folder.iterdir():
            if trained.is_dir():
                shutil.rmtree(trained)
    return guess


def search(l0_at: Callable[[Sequence[float]], Sequence[float]], guess: float, k: float) -> tuple[float, list[float], list[float]]:
    """Coefficients around a guess, then around the crossing of what they found, until they enclose L0 = k and one comes near it.

    `l0_at` gives the L0 of one pilot for each coefficient. Returns the coefficient read off between them,
    those tried, and the L0 of each.
    """
    tried: list[float] = []
    found: list[float] = []
    for _ in range(ATTEMPTS):
        around = [guess * factor for factor in AROUND]
        tried += around
        found += l0_at(around)
        guess = crossing(tried, found, k)
        if min(found) <= k <= max(found) and any(1 / NEAR < l0 / k < NEAR for l0 in found):
            break
    return guess, tried, found


def sparser_and_denser(
    recipe: Recipe, blocks: Blocks, coefficient: float, folder: Path | None, device: torch.device
) -> list[Ensemble]:
    """Two pilots beside a recipe, each an ensemble of one seed, with about `ASIDE` times fewer and more features a token.

    A pilot that diverges is left out.
    """
    jobs = []
    for name, factor in (("sparser", 1 / ASIDE), ("denser", ASIDE)):
        k = recipe.k if variant(recipe.variant).steered else min(recipe.d_sae, max(1, round(recipe.k * factor)))
        aside = recipe.model_copy(update={"k": k})
        jobs.append(Job(aside, blocks.first(recipe.tokens), [PILOT_SEEDS], folder and folder / name, [coefficient / factor]))
    return [pilot for pilot in train_all(jobs, "pilots", device) if pilot.seeds]


def _l0(recipe: Recipe, blocks: Blocks, coefficients: Sequence[float], folder: Path | None, device: torch.device) -> list[float]:
    """The L0 at inference of one pilot seed for each coefficient; infinite where it diverged."""
    seeds = list(range(PILOT_SEEDS, PILOT_SEEDS + len(coefficients)))
    (pilots,) = train_all([Job(recipe, blocks.first(recipe.tokens), seeds, folder, coefficients)], "pilots", device)
    return [l0(pilots, pilots.seeds.index(seed), blocks.block(0)) if seed in pilots.seeds else math.inf for seed in seeds]


def l0(ensemble: Ensemble, position: int, activations: Activations) -> float:
    """Features of one seed that fire on a token, on average over a random sample of the tokens."""
    keys = np.random.SeedSequence(0).generate_state(ROUNDS, np.uint64)
    rows = torch.from_numpy(shuffled(len(activations), keys, 0, min(MEASURED, len(activations))))
    firings = 0
    for part in rows.split(4096):
        _, codes = next(ensemble.of(position).codes(activations.normalised(part)))
        firings += len(codes.fired())
    return firings / len(rows)


def crossing(coefficients: Sequence[float], found: Sequence[float], k: float) -> float:
    """Where L0 falls to k as the coefficient rises, read off between the pilots on either side, or a step beyond all of them."""
    above = max(((c, l0) for c, l0 in zip(coefficients, found, strict=True) if l0 >= k), default=None)
    below = min(((c, l0) for c, l0 in zip(coefficients, found, strict=True) if l0 < k), default=None)
    if above is None:
        return min(coefficients) / BEYOND
    if below is None:
        return max(coefficients) * BEYOND
    (low, dense), (high, sparse) = above, below
    if low >= high:  # by the noise of seeds
        return math.sqrt(low * high)
    dense, sparse = min(dense, 10 * k), max(sparse, k / 10)  # far from the target, L0 says little about it
    return low * (high / low) ** (math.log(dense / k) / math.log(dense / sparse))
