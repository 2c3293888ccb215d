"""Worlds whose features are known: what an SAE should find is what the activations were made of (C8).

A token of a world is a sum of *isolated* features, of one *block*, of *rare* features, and of noise. A block has m features in r
dimensions, fewer than m: it is low-rank. Its law says what it adds: `active` of its features with random strengths, or, where that
is None, a random vector of its space that has no preferred direction. Of the latter no features can be told: any rotation of them
makes the same data (PAPER, Theory).

Isolated features and blocks lie at right angles, block by block, unless a world is `crowded`: features of the rest that lean into a
block's space would mark directions in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from joblib import Parallel, delayed
from scipy.optimize import nnls
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.language.activations import Activations
from sae_stability.matching import stability
from sae_stability.matching.theory import expected_stability
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.topk import TopK
from sae_stability.study import Recipe
from sae_stability.training.loop import generator
from sae_stability.training.together import train_together

FOUND = 0.9
"""Cosine from which a latent is a true feature, and share of its length inside a block from which it is one of the block's."""
UNIQUE = 250_000
"""Tokens of a world that are drawn for training at most; more are read in several passes."""
HELD_OUT = 100_000
"""Others on which SAEs are judged, or twice as many as they read: what fires on one in ten thousand fires on ten of them."""
THRESHOLD = 0.7
WHERE = {"model": "synthetic", "corpus": "synthetic", "hook_name": "blocks.0.hook_resid_post"}  # what a recipe must name


@dataclass(frozen=True)
class World:
    """A world, and the SAEs that are trained on it. Its `seed` draws its features and its tokens."""

    r: int = 8
    """Dimensions of a block."""
    features_over_r: float = 2.0
    """m / r: the features of a block over its dimensions."""
    active: int | None = None
    """Features of a block that are active on a token; None for a law without preferred directions."""
    budget: float = 1.0
    """k over the number of features that are active on a token; a block without features to tell counts r."""
    width: float = 1.25
    """d_sae over the number of true features."""
    isolated: int = 24
    isolated_active: int = 2
    """Isolated features on each token."""
    zipf: float = 0.0
    """Isolated feature number i is drawn with a weight of 1 / i to this power."""
    rare: int = 0
    rare_frequency: float = 1e-3
    blocks: int = 2
    noise: float = 0.0
    """Length of Gaussian noise over that of a feature of strength 1."""
    together: float = 0.0
    """Probability that the partner of an active isolated feature, its neighbour by number, is active too."""
    hierarchy: bool = False
    """Whether isolated features of odd number are active with the one before them only, and then with probability one half."""
    crowded: bool = False
    """Whether features of all kinds have random directions, with no right angles between them."""
    tokens: int = 500_000
    from_truth: bool = False
    """Whether SAEs start from the true features, as far as they have latents for them, and not from random directions."""
    seed: int = 0

    @property
    def m(self) -> int:
        return round(self.features_over_r * self.r)

    @property
    def true_features(self) -> int:
        return self.isolated + self.rare + self.blocks * self.m

    @property
    def l0(self) -> float:
        """True features on a token, without rare ones; a block without features to tell counts its dimensions."""
        called = 0.5 if self.hierarchy else self.together
        return self.isolated_active * (1 + called) + (0 if self.blocks == 0 else self.active or self.r)

    @property
    def k(self) -> int:
        return max(1, round(self.budget * self.l0))

    @property
    def d_sae(self) -> int:
        return max(self.k, round(self.width * self.true_features))

    @property
    def d_in(self) -> int:
        """As many dimensions as features at right angles need, rounded up to a multiple of 8; half of that in a crowded world."""
        needed = self.isolated + self.rare + self.blocks * self.r
        return -(-needed // (16 if self.crowded else 8)) * 8

    @cached_property
    def truth(self) -> "Truth":
        """Its features."""
        generator = torch.Generator().manual_seed(100 * self.seed)
        alone = self.isolated + self.rare
        if self.crowded:
            directions = F.normalize(torch.randn(alone, self.d_in, generator=generator), dim=1)
            spaces = torch.linalg.qr(torch.randn(self.blocks, self.d_in, self.r, generator=generator))[0]
        else:
            axes = torch.linalg.qr(torch.randn(self.d_in, alone + self.blocks * self.r, generator=generator))[0]
            directions, spaces = axes[:, :alone].T, axes[:, alone:].T.reshape(self.blocks, self.r, self.d_in).mT
        features = F.normalize(torch.randn(self.blocks, self.m, self.r, generator=generator), dim=2)
        return Truth(directions[: self.isolated], directions[self.isolated :], features @ spaces.mT, spaces)

    def draw(self, tokens: int, generator: torch.Generator) -> Float[Tensor, "token d_in"]:
        """Some of its tokens."""
        truth = self.truth
        x = _strengths(self._isolated_active(tokens, generator), generator) @ truth.isolated
        if self.rare:
            x += _strengths(torch.rand(tokens, self.rare, generator=generator) < self.rare_frequency, generator) @ truth.rare
        if self.blocks:
            block = torch.randint(self.blocks, (tokens,), generator=generator)
            if self.active is None:
                inside = F.normalize(torch.randn(tokens, self.r, generator=generator), dim=1)
                inside *= self.r**0.5 * (0.5 + torch.rand(tokens, 1, generator=generator))
                directions = truth.spaces.mT
            else:
                inside = _strengths(_exactly(self.active, torch.ones(self.m), tokens, generator), generator)
                directions = truth.in_blocks
            for number in range(self.blocks):
                x.addmm_(inside * (block == number)[:, None], directions[number])
        return x + self.noise * self.d_in**-0.5 * torch.randn(x.shape, generator=generator)

    def activations(self, tokens: int, draw: int) -> Float[Tensor, "token d_in"]:
        """Some of its tokens; another `draw` gives others."""
        return self.draw(tokens, torch.Generator().manual_seed(100 * self.seed + draw))

    @property
    def passes(self) -> int:
        return -(-self.tokens // UNIQUE)

    @property
    def unique(self) -> int:
        """Tokens that are drawn for training."""
        return self.tokens // self.passes

    @property
    def recipe(self) -> Recipe:
        """What is trained on it: TopK SAEs, in float32."""
        size = {"tokens": self.unique, "passes": self.passes, "d_sae": self.d_sae, "k": self.k}
        training = {"variant": "topk", "batch": 512, "rate": 1e-2, "encoder": "float32", "dead_after": 20_000}
        return Recipe.model_validate(WHERE | size | training)

    def _isolated_active(self, tokens: int, generator: torch.Generator) -> Bool[Tensor, "token isolated"]:
        weights = torch.arange(1.0, self.isolated + 1) ** -self.zipf
        if self.hierarchy:
            weights[1::2] = 0
        active = _exactly(self.isolated_active, weights, tokens, generator)
        if self.hierarchy:
            children = torch.rand(tokens, self.isolated // 2, generator=generator) < 0.5
            active[:, 1::2] = active[:, 0 : 2 * (self.isolated // 2) : 2] & children
        if self.together:
            partners = active[:, torch.arange(self.isolated) ^ 1]
            active |= partners & (torch.rand(active.shape, generator=generator) < self.together)
        return active


@dataclass(frozen=True)
class Truth:
    """The features of a world, all of unit length."""

    isolated: Float[Tensor, "isolated d_in"]
    rare: Float[Tensor, "rare d_in"]
    in_blocks: Float[Tensor, "block m d_in"]
    spaces: Float[Tensor, "block d_in r"]
    """Orthonormal columns that span each block."""

    @property
    def features(self) -> Float[Tensor, "feature d_in"]:
        return torch.cat([self.isolated, self.rare, self.in_blocks.flatten(0, 1)])


def _strengths(active: Bool[Tensor, "token feature"], generator: torch.Generator) -> Float[Tensor, "token feature"]:
    """Uniform between a half and three halves where a feature is active."""
    return active * (0.5 + torch.rand(active.shape, generator=generator))


def _exactly(
    count: int, weights: Float[Tensor, "feature"], tokens: int, generator: torch.Generator
) -> Bool[Tensor, "token feature"]:
    """So many features on every token, drawn one after another by their weights (Gumbel's trick)."""
    chosen = torch.zeros(tokens, len(weights), dtype=torch.bool)
    if count:
        keys = weights.log() - torch.log(-torch.log(torch.rand(tokens, len(weights), generator=generator)))
        chosen.scatter_(1, keys.topk(count, dim=1).indices, True)
    return chosen


def coding_error(v: Float[np.ndarray, "vector r"], directions: Float[np.ndarray, "latent r"], k: int) -> float:
    """The mean of |v - D a|^2 / |v|^2 at best, where at most k entries of a are positive and none is negative: all are tried."""
    errors = []
    for vector in v:
        choices = combinations(range(len(directions)), min(k, len(directions)))
        errors.append(min(nnls(directions[list(chosen)].T, vector)[1] ** 2 for chosen in choices) / (vector @ vector))
    return float(np.mean(errors))


@dataclass(frozen=True)
class Recovery:
    """What seeds of SAEs found of a world. Shares are means over seeds; NaN where there is nothing of the kind, and stabilities of
    one seed alone."""

    found_isolated: float
    """Share of isolated features with a latent at a cosine of `FOUND`."""
    found_rare: float
    found_in_blocks: float
    """The same of the features of blocks."""
    subspace: float
    """How much of a block's space its latents span: their top r axes, ||V^T B||^2 / r."""
    latents: float
    """Latents of a block: those with `FOUND` of their length inside it."""
    p_isolated: float
    """Stability of the latents that are isolated features."""
    p_in_blocks: float
    """Stability of the latents of blocks."""
    p_others: float
    """Stability of the latents that are neither a true feature nor one of a block."""
    stable_false: float
    """Share of the latents with a stability of 0.9 or more that are no true feature."""


def recovery(truth: Truth, W_dec: Float[Tensor, "seed d_sae d_in"], alive: Bool[Tensor, "seed d_sae"]) -> Recovery:
    """Measure the live latents of an ensemble against a world's truth."""
    directions = F.normalize(W_dec.float(), dim=2) * alive[:, :, None]
    p = stability(W_dec, THRESHOLD, alive).probability if len(W_dec) > 1 else torch.full(alive.shape, torch.nan)
    features = truth.features
    nearest = (directions @ features.T).amax(2)
    of_block = of_blocks(directions, truth)
    alone = torch.cat([truth.isolated, truth.rare])
    isolated = (directions @ alone.T).amax(2) >= FOUND if len(alone) else torch.zeros_like(alive)

    def found(kind: Float[Tensor, "feature d_in"]) -> float:
        return float(((directions @ kind.T).amax(1) >= FOUND).float().mean()) if len(kind) else np.nan

    def mean(member: Bool[Tensor, "seed d_sae"]) -> float:
        chosen = p[member & alive]
        return float(chosen.mean()) if len(chosen) else np.nan

    stable = alive & (p >= 0.9)
    return Recovery(
        found_isolated=found(truth.isolated),
        found_rare=found(truth.rare),
        found_in_blocks=found(truth.in_blocks.flatten(0, 1)),
        subspace=_spanned(directions, of_block, truth.spaces),
        latents=float(of_block.float().sum(2).mean()) if len(truth.spaces) else np.nan,
        p_isolated=mean(isolated),
        p_in_blocks=mean(of_block.any(0)) if len(truth.spaces) else np.nan,
        p_others=mean(~isolated & ~of_block.any(0)),
        stable_false=float((stable & (nearest < FOUND)).sum() / stable.sum()) if stable.any() else np.nan,
    )


def of_blocks(directions: Float[Tensor, "seed d_sae d_in"], truth: Truth) -> Bool[Tensor, "block seed d_sae"]:
    """Which latents are of which block: `FOUND` of their length lies inside it."""
    return torch.einsum("sfd,bdr->bsfr", directions, truth.spaces).norm(dim=3) >= FOUND


def _spanned(directions: Tensor, of_block: Bool[Tensor, "block seed d_sae"], spaces: Float[Tensor, "block d_in r"]) -> float:
    """On average over blocks and seeds. A block with fewer latents than dimensions is spanned in part."""
    shares = []
    for space, by_seed in zip(spaces, of_block, strict=True):
        for rows, member in zip(directions, by_seed, strict=True):
            axes = torch.linalg.svd(rows[member], full_matrices=False)[2][: space.shape[1]]
            shares.append(float((axes @ space).square().sum() / space.shape[1]))
    return float(np.mean(shares)) if shares else np.nan


def trained(world: World, seeds: Sequence[int]) -> Ensemble:
    """SAEs of a world, all seeds side by side."""
    recipe, x = world.recipe, Activations.of(world.activations(world.unique, draw=1))
    method = TopK(recipe.k)
    begun = [method.initialise(x.d_in, recipe.d_sae, generator(recipe, seed)) for seed in seeds]
    sae = Parameters(*(torch.stack(tensors) for tensors in zip(*begun, strict=True)))
    if world.from_truth:
        features = world.truth.features[: world.d_sae]
        sae.b_dec[:] = -x.mean * x.scale  # activations are centred, and sums of features are not
        for directions in (sae.W_dec, sae.W_enc_rows):
            directions[:, : len(features)] = features
    train_together(recipe, x, seeds, sae)
    return Ensemble(recipe.variant, recipe.k, list(seeds), sae, x.mean, x.scale)


def measure(world: World, seeds: int) -> dict:
    """Train SAEs of some seeds on a world: its parameters, what they found (`Recovery`) and how well they explain other tokens."""
    with threads.single():
        ensemble = trained(world, range(seeds))
        x = world.activations(min(HELD_OUT, 2 * world.tokens), draw=2)
        centred, alive, explained = ensemble.normalise(x - x.mean(0) + ensemble.mean), [], []
        for sae, codes in ensemble.codes(ensemble.normalise(x)):
            alive.append(torch.bincount(codes.fired(), minlength=ensemble.d_sae) > 0)
            error = codes.decode(sae.W_dec) + sae.b_dec - ensemble.normalise(x)
            explained.append(float(1 - error.square().sum() / centred.square().sum()))
        found = recovery(world.truth, ensemble.W_dec, torch.stack(alive))
    expected = expected_stability(world.r, found.latents, THRESHOLD) if world.blocks else np.nan
    known = {**asdict(world), "k": world.k, "d_sae": world.d_sae, "d_in": world.d_in, "l0": world.l0, "seeds": seeds}
    return {**known, **asdict(found), "expected_p": expected, "explained_variance": float(np.mean(explained))}


def each_world(work: Callable[[World, int], Any], worlds: Sequence[World], seeds: int, described: str) -> list:
    """What `work` gives for each world and a number of seeds, in their order: as many processes as PyTorch has threads, one world
    each at a time."""
    found = Parallel(n_jobs=torch.get_num_threads(), return_as="generator")(delayed(work)(world, seeds) for world in worlds)
    return list(tqdm(found, described, total=len(worlds), unit="world", disable=None))


def measure_all(worlds: Sequence[World], seeds: int, described: str) -> pd.DataFrame:
    """One row a world, in their order."""
    return pd.DataFrame(each_world(measure, worlds, seeds, described))
