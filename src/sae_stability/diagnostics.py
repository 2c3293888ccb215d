"""The reverse test: where the truth is known, can it be seen of an unstable latent that it is an axis of a block, and not a feature
of its own that few seeds find, or a left-over? What can't tell them apart in worlds says nothing of a language model.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sae_stability import threads
from sae_stability.matching import BANDS, Stability, stability
from sae_stability.subspaces.copies import group_cosines, spearman_brown
from sae_stability.synthetic import HELD_OUT, THRESHOLD, World, each_world, of_blocks, trained

NEIGHBOURS = 8
"""Unstable features of another seed whose span is asked how much of a feature it holds: those most like it either way round."""
DIAGNOSTICS = ("best", "averaged", "spanned")
TOGETHER = "all of them"
BLOCK, OWN, LEFT_OVER = "axis of a block", "feature of its own", "left-over"
FEWEST = 5
"""Latents of a kind from which a world is judged."""
IS = 0.7
"""Cosine from which a latent outside blocks is a true feature, if not well learned."""


def diagnose(W_dec: Float[Tensor, "seed d_sae d_in"], found: Stability, most: Sequence[int] | None = None) -> pd.DataFrame:
    """What directions alone tell of each unstable feature: one row each. Of a seed at most so many are taken, drawn at random, if
    `most` says so: more of them span more.

    Columns: `seed` (its position), `feature`; `best`, its best cosine in another seed; `averaged`, the cosine of the mean around it
    and that around its partner, each of half of the seeds, less what noisy copies of one direction would have: 0 for these, less
    for turned axes; `spanned`, the share of its squared length inside the span of its `NEIGHBOURS` nearest unstable features of
    another seed. All are means over the other seeds, of which there have to be three.
    """
    directions, seeds = F.normalize(W_dec.float(), dim=2), len(W_dec)
    unstable = [np.flatnonzero(band == BANDS.index("unstable")) for band in found.band]
    if most is not None:
        draws = [np.random.default_rng(seed).permutation(members) for seed, members in enumerate(unstable)]
        unstable = [np.sort(drawn[:size]) for drawn, size in zip(draws, most, strict=True)]
    single, several = (group_cosines(directions, found, size) for size in (1, seeds // 2))
    averaged = several - spearman_brown(single, seeds // 2)
    tables = []
    for s in range(seeds):
        feature, others = torch.from_numpy(unstable[s]), [t for t in range(seeds) if t != s]
        spanned = [_spanned(directions[s, feature], directions[t, torch.from_numpy(unstable[t])]) for t in others]
        columns = {
            "best": found.best_cosine[s, others][:, feature].numpy().mean(0),
            "averaged": averaged[s, others][:, feature].mean(0),
            "spanned": np.mean(spanned, axis=0),
        }
        tables.append(pd.DataFrame({"seed": s, "feature": feature.numpy(), **columns}))
    return pd.concat(tables, ignore_index=True)


def _spanned(rows: Float[Tensor, "feature d_in"], others: Float[Tensor, "other d_in"]) -> Float[np.ndarray, "feature"]:
    """The share of each row's squared length inside the span of those of the others that are most like it."""
    if not len(others):
        return np.zeros(len(rows))
    cosines = rows @ others.T
    near = others[cosines.abs().topk(min(NEIGHBOURS, len(others)), dim=1).indices]
    axes = torch.linalg.qr(near.mT)[0]
    return (rows[:, None] @ axes)[:, 0].square().sum(1).numpy()


def unstable_latents(world: World, seeds: int) -> pd.DataFrame:
    """The unstable latents of a world, with what `diagnose` tells, and what each is (`kind`): one row each.

    An axis of a block lies inside it (`synthetic.of_blocks`); of the others some are true features (`IS`), and most are left over.
    """
    with threads.single():
        ensemble, truth = trained(world, range(seeds)), world.truth
        codes = ensemble.codes(ensemble.normalise(world.activations(HELD_OUT, draw=2)))
        alive = torch.stack([torch.bincount(of_seed.fired(), minlength=ensemble.d_sae) > 0 for _, of_seed in codes])
        table = diagnose(ensemble.W_dec, stability(ensemble.W_dec, THRESHOLD, alive))
        directions = F.normalize(ensemble.W_dec.float(), dim=2)
        block = of_blocks(directions, truth).any(0).numpy()
        own = ((directions @ torch.cat([truth.isolated, truth.rare]).T).amax(2) >= IS).numpy()
    place = (table["seed"].to_numpy(), table["feature"].to_numpy())
    return table.assign(kind=np.where(block[place], BLOCK, np.where(own[place], OWN, LEFT_OVER)))


def all_unstable_latents(worlds: Sequence[World], seeds: int, described: str) -> pd.DataFrame:
    """Those of several worlds, told apart by the column `world`."""
    tables = each_world(unstable_latents, worlds, seeds, described)
    return pd.concat([table.assign(world=number) for number, table in enumerate(tables)], ignore_index=True)


def told_apart(latents: pd.DataFrame, other: str) -> pd.DataFrame:
    """How well each diagnostic, and a logistic regression on all, tells axes of blocks from another kind: area under the ROC curve.

    The regression is fitted on all worlds but one and judged on that one; so is on which side of a single diagnostic blocks lie.
    Columns: diagnostic, and `roc`, the mean over worlds, with the smallest and the largest as its ends: worlds are of several
    designs, and no sample of any. Worlds with fewer than `FEWEST` of either kind are left out.
    """
    both = latents[latents["kind"].isin([BLOCK, other])]
    counts = both.groupby(["world", "kind"]).size().unstack(fill_value=0)
    both = both[both["world"].isin(counts.index[(counts >= FEWEST).all(axis=1)])].reset_index(drop=True)
    rows = []
    for name, columns in {**{name: [name] for name in DIAGNOSTICS}, TOGETHER: list(DIAGNOSTICS)}.items():
        areas = [_judged(both, (both["world"] == world).to_numpy(), columns) for world in both["world"].unique()]
        rows.append({"diagnostic": name, "roc": np.mean(areas), "roc_low": min(areas), "roc_high": max(areas)})
    return pd.DataFrame(rows)


def _judged(latents: pd.DataFrame, held_out: Bool[np.ndarray, "latent"], columns: list[str]) -> float:
    """The area on the latents that are held out, of a regression that was fitted on the others."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    of_block = latents["kind"] == BLOCK
    regression.fit(latents.loc[~held_out, columns], of_block[~held_out])
    return float(roc_auc_score(of_block[held_out], regression.decision_function(latents.loc[held_out, columns])))
