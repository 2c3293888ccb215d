"""Ranks, overlaps and angles of subspaces. A subspace is given by orthonormal columns, [d_in, r]."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HELD = 0.9
"""The share of its energy at which the rank of a set is taken."""


def effective_rank(rows: Float[Tensor, "row d_in"]) -> float:
    """The exponential of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007); NaN without rows.

    Rows are taken at unit length.
    """
    if not len(rows):
        return float("nan")
    values = torch.linalg.svdvals(F.normalize(rows.double(), dim=1)).numpy()
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rank_holding(spectrum: Float[np.ndarray, "d_in"], share: float = HELD) -> float:
    """How many of the strongest axes hold a share of the energy, with the part of the last one that is needed; NaN without energy.

    `spectrum` is the energy along each axis, from the strongest on.
    """
    total = spectrum.sum()
    if total <= 0:
        return float("nan")
    held = np.cumsum(spectrum) / total
    last = int(np.searchsorted(held, share))
    before = held[last - 1] if last else 0.0
    return float(last + (share - before) / (held[last] - before))


def overlaps(one: Float[np.ndarray, "d_in axis"], other: Float[np.ndarray, "d_in other_axis"]) -> Float[np.ndarray, "r"]:
    """||U_r^T V_r||_F^2 / r of the first r axes of either, for r = 1, 2, ... as far as both have them.

    That is the mean squared cosine of their principal angles: 1 for the same subspace, and r / d_in by chance.
    """
    squares = np.diagonal(np.square(one.T @ other).cumsum(0).cumsum(1))
    return squares / np.arange(1, len(squares) + 1)


def principal_angles(one: Float[np.ndarray, "d_in r"], other: Float[np.ndarray, "d_in r"]) -> Float[np.ndarray, "r"]:
    """In degrees, from the smallest on (Björck & Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3)."""
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def captured(covariance: Float[np.ndarray, "d_in d_in"], axes: Float[np.ndarray, "d_in axis"]) -> Float[np.ndarray, "axis"]:
    """The share of the energy of what has this covariance that lies along the first r axes, r = 1, 2, ...; NaN without energy."""
    total = np.trace(covariance)
    along = ((covariance @ axes) * axes).sum(0).cumsum()
    return along / total if total > 0 else np.full(len(along), np.nan)


def strongest_axes(
    covariance: Float[np.ndarray, "d_in d_in"],
) -> tuple[Float[np.ndarray, "d_in d_in"], Float[np.ndarray, "d_in"]]:
    """Principal axes as columns and the energy along each, from the strongest on."""
    energies, axes = np.linalg.eigh(covariance)
    return axes[:, ::-1], np.maximum(energies[::-1], 0.0)


def chance_of_overlap(r: int, d_in: int) -> tuple[float, float]:
    """Mean and standard deviation of the overlap of two uniformly random subspaces.

    The variance of tr(P Q) is 2 r^2 (d - r)^2 / (d^2 (d - 1) (d + 2)), that of a uniform point of a Grassmannian.
    """
    variance = 2 * r**2 * (d_in - r) ** 2 / (d_in**2 * (d_in - 1) * (d_in + 2))
    return r / d_in, variance**0.5 / r
