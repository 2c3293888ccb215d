"""A histogram of which a reader moves the threshold: in how many other seeds do features come back at it?"""

import html
import json
from collections.abc import Mapping

import numpy as np
import torch

from sae_stability.matching import Stability

THRESHOLDS = [round(float(threshold), 2) for threshold in np.arange(0.3, 1.0, 0.01)]


def shares_back(stability: Stability) -> list[list[float]]:
    """Of each of `THRESHOLDS`, which share of the live features comes back in 0, 1, ... of the other seeds."""
    rows = []
    for threshold in THRESHOLDS:
        counts = stability.at(threshold).counts[stability.alive]
        shares = torch.bincount(counts, minlength=stability.trials + 1).double() / len(counts)
        rows.append(shares.numpy().round(4).tolist())  # in 64 bits, in which four digits stay four
    return rows


def threshold_slider(stabilities: Mapping[str, Stability], names: Mapping[str, str], begin: float) -> str:
    """The histogram as HTML, of each kind under its name, at the threshold nearest to `begin`; `slider.js` draws it."""
    data = {"thresholds": THRESHOLDS, "kinds": {names[kind]: shares_back(of_kind) for kind, of_kind in stabilities.items()}}
    at = int(np.abs(np.array(THRESHOLDS) - begin).argmin())
    return (
        f'<div class="slider" data-shares="{html.escape(json.dumps(data))}">'
        f'<label>Threshold <input type="range" min="0" max="{len(THRESHOLDS) - 1}" value="{at}"></label> <output></output>'
        '<div class="bars"></div><noscript>This histogram needs JavaScript.</noscript></div>'
    )
