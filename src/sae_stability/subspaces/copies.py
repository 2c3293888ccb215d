"""Noise or ambiguity: are unstable features noisy copies of a common one?

If the seeds see a common direction and noise of their own, means of G of them come closer to one another as Spearman and Brown say:
from a cosine c of two to G c / (1 + (G - 1) c). If each seed sees another rotation of one block of features, they do not.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_stability.matching import BANDS, Stability
from sae_stability.matching.pairs import reaches


def spearman_brown(cosine: Float[np.ndarray, "*any"], size: int) -> Float[np.ndarray, "*any"]:
    """What the cosine of means of `size` noisy copies is, if that of two copies is `cosine`."""
    return size * cosine / (1 + (size - 1) * cosine)


def copies(W_dec: Float[Tensor, "seed d_sae d_in"], stability: Stability, kept: list[int]) -> pd.DataFrame:
    """Group means of some seeds (positions), by band and group size: one row each, up to half of the seeds in a group.

    Bands of seeds s and t come from the other ones, with as many misses, or matches, as all seeds allow. Columns: band, size;
    `cosine` of the means of two groups around partners, on average over pairs of seeds and their features; `predicted`, the average
    of what Spearman and Brown make of the cosines of the same two without their groups; and `share`, of the means that reach the
    threshold. No rows for fewer than three seeds.
    """
    among, directions = stability.among(kept), F.normalize(W_dec[kept].float(), dim=2)
    band = stability.held_out_band_among(kept)
    single, rows = group_cosines(directions, among, 1), []
    for size in sorted({1, 2, len(kept) // 2} & {*range(1, len(kept) // 2 + 1)}) if len(kept) > 2 else ():
        cosine = group_cosines(directions, among, size)
        for number, name in enumerate(BANDS):
            inside = (band == number) & np.isfinite(cosine)
            found, predicted = (each[inside].mean() if inside.any() else np.nan for each in (cosine, spearman_brown(single, size)))
            reached = reaches(torch.from_numpy(cosine[inside]), stability.threshold).double().mean()
            rows.append({"band": name, "size": size, "cosine": found, "predicted": predicted, "share": float(reached)})
    return pd.DataFrame(rows, columns=["band", "size", "cosine", "predicted", "share"])


def group_cosines(
    directions: Float[Tensor, "seed d_sae d_in"], stability: Stability, size: int
) -> Float[np.ndarray, "seed seed d_sae"]:
    """[s, t, i]: the cosine of the mean around feature i of seed s and the mean around its partner in seed t; NaN where t is s.

    The other seeds are split among the two by their order from t on, so that no seed is on both sides. Each side is averaged with
    its own partners in `size` - 1 of the seeds that fall to it: that of t is built around the partner, and knows nothing of the
    feature of s. `directions` have unit length.
    """
    seeds = len(directions)
    cosine = np.full((seeds, seeds, directions.shape[1]), np.nan)
    for s in range(seeds):
        for t in (t for t in range(seeds) if t != s):
            others = [(t + step) % seeds for step in range(1, seeds) if (t + step) % seeds != s]
            one, other = (
                _mean_direction(directions, stability, seed, group[: size - 1])
                for seed, group in ((s, others[0::2]), (t, others[1::2]))
            )
            partner = stability.partner[s, t]
            there = (one * other[partner.clamp(min=0)]).sum(1)
            cosine[s, t] = torch.where(partner >= 0, there, torch.nan).numpy()
    return cosine


def _mean_direction(
    directions: Float[Tensor, "seed d_sae d_in"], stability: Stability, seed: int, group: list[int]
) -> Float[Tensor, "d_sae d_in"]:
    """Of each feature of a seed and its partners in a group of others. What is dead has partner -1, and its mean is of no use."""
    total = directions[seed].clone()
    for other in group:
        total += directions[other][stability.partner[seed, other].clamp(min=0)]
    return F.normalize(total, dim=1)
