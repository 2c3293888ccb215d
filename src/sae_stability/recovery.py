"""What pools of seeds find where the truth is known: more of a world's true features than any of their seeds, or more that is
none?"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sae_stability import threads
from sae_stability.pooling import Kind, measure, pool
from sae_stability.saes.sae import SAE
from sae_stability.synthetic import FOUND, HELD_OUT, Truth, World, each_world, recovery, trained

SINGLE, BEST = "single", "best single"
GROUPS = 2
"""Disjoint groups that a world's seeds are split into, each of which makes a pool of each kind."""


def pooled(world: World, seeds: int) -> pd.DataFrame:
    """One row per product of a world: single SAEs, the best of each group by what it finds, and pools of each kind.

    Columns: `product`; `features`, how many fire; `found`, the share of all true features that a latent finds at a cosine of
    `FOUND`; `precision`, the share of the latents that are true features; the fields of `Recovery`, in which stability is that of
    one group's product in the other's. All are means over SAEs.
    """
    with threads.single():
        ensemble, x = trained(world, range(seeds)), world.activations(HELD_OUT, draw=2)
        saes, size = [ensemble.dictionary(position) for position in range(seeds)], seeds // GROUPS
        groups = [saes[number * size : (number + 1) * size] for number in range(GROUPS)]
        products: dict[str, list[SAE]] = {SINGLE: saes}
        products[BEST] = [max(group, key=lambda sae: _found(*_live([sae], x), world.truth)[0]) for group in groups]
        products |= {kind: [pool(group, x, kind).sae for group in groups] for kind in get_args(Kind)}
        rows = []
        for name, of_groups in products.items():
            directions, alive = _live(of_groups, x)
            found, precision = _found(directions, alive, world.truth)
            row = {"product": name, "features": float(alive.sum() / len(of_groups)), "found": found, "precision": precision}
            rows.append(row | asdict(recovery(world.truth, directions, alive)))
    return pd.DataFrame(rows)


def _live(saes: Sequence[SAE], x: Float[Tensor, "token d_in"]) -> tuple[Float[Tensor, "sae d_sae d_in"], Bool[Tensor, "sae d_sae"]]:
    """The directions of SAEs, narrower ones filled up with zeros, and which of them fire."""
    width = max(len(sae.directions) for sae in saes)
    rows = [F.pad(F.normalize(sae.directions, dim=1), [0, 0, 0, width - len(sae.directions)]) for sae in saes]
    fires = [F.pad(measure(sae, x).firings, [0, width - len(sae.directions)]) > 0 for sae in saes]
    return torch.stack(rows), torch.stack(fires)


def _found(directions: Float[Tensor, "sae d_sae d_in"], alive: Bool[Tensor, "sae d_sae"], truth: Truth) -> tuple[float, float]:
    """The share of the true features that a latent finds, and of the latents that are one: means over SAEs."""
    near = ((directions * alive[:, :, None]) @ truth.features.T) >= FOUND
    return float(near.any(1).double().mean()), float((near.any(2).sum(1) / alive.sum(1)).mean())


def pooled_all(worlds: Sequence[World], seeds: int, described: str) -> pd.DataFrame:
    """`pooled` of several worlds, told apart by the column `world`."""
    tables = each_world(pooled, worlds, seeds, described)
    return pd.concat([table.assign(world=number) for number, table in enumerate(tables)], ignore_index=True)
