"""How often features come back where each seed turns the axes of a space at random: what theory expects (C7, C8)."""

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc

LATENTS_OVER_R = 2.0
"""Latents of a block over its dimensions, where nothing says how many there are."""
LARGEST_RANK = 1e4


def expected_stability(r: float, latents: float, threshold: float = 0.7) -> float:
    """p(r, M): how often one of M random directions in r dimensions comes within a threshold of a given one (PAPER, Theory).

    q = I_{1 - tau^2}((r - 1)/2, 1/2) / 2 is the share of a sphere within a cosine of tau; p = 1 - (1 - q)^M.
    """
    share = betainc((r - 1) / 2, 0.5, 1 - threshold**2) / 2
    return float(-np.expm1(latents * np.log1p(-share)))


def ambiguity_rank(median_cosine: float) -> float:
    """Of how many dimensions a block is whose axes, `LATENTS_OVER_R` a dimension, have this median best cosine in another seed.

    Infinite for a cosine that is smaller than in `LARGEST_RANK` dimensions; 2 for one that is larger than in a plane.
    """

    def excess(r: float) -> float:
        return expected_stability(r, LATENTS_OVER_R * r, median_cosine) - 0.5

    if not median_cosine < 1 or excess(2.0) < 0:
        return 2.0
    if excess(LARGEST_RANK) > 0:
        return float("inf")
    return float(brentq(excess, 2.0, LARGEST_RANK))
