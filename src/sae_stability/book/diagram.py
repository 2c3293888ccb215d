"""The phase diagram of synthetic worlds to look into: a reader picks a slice and a share, and sees the world behind each point."""

import html
import json
from dataclasses import MISSING, fields

import pandas as pd

from sae_stability.synthetic import World

SLICES = {
    "active and budget": ("active", "budget", None),
    "dimensions and features": ("r", "features_over_r", "active"),
    "width and budget": ("width", "budget", "active"),
    "frequency and tokens": ("rare_frequency", "tokens", "zipf"),
    "noise": ("active", "noise", None),
    "together": ("active", "together", None),
    "hierarchy": ("active", "hierarchy", None),
    "crowded": ("active", "crowded", None),
    "from the truth": ("active", "from_truth", "r"),
}
"""Of each slice, the parameters of its rows, of its columns, and of its panels where a third one varies."""
PARAMETERS = {
    "r": "dimensions of a block, r",
    "features_over_r": "features of a block over its dimensions",
    "active": "features of a block that are active at a time",
    "budget": "budget k, over the features that are there",
    "width": "latents over true features",
    "isolated": "isolated features",
    "isolated_active": "isolated features on a token",
    "zipf": "how unevenly isolated features are drawn (exponent)",
    "rare": "rare features",
    "rare_frequency": "frequency of each rare feature",
    "blocks": "blocks",
    "noise": "length of the noise, over a feature's",
    "together": "probability that a partner fires too",
    "hierarchy": "features fire under a parent only",
    "crowded": "features lean into each other's spaces",
    "tokens": "training tokens",
    "from_truth": "training starts from the true features",
    "k": "features that fire on a token, k",
    "d_sae": "features of an SAE",
    "d_in": "dimensions of the space",
}
FOUND = {
    "found_in_blocks": "block features found",
    "found_isolated": "isolated features found",
    "found_rare": "rare features found",
    "subspace": "part of the blocks' space that is spanned",
    "p_in_blocks": "stability of block latents",
    "expected_p": "stability of as many random directions",
    "explained_variance": "explained variance",
}
"""Shares between 0 and 1 that a world can be coloured by."""


def phase_diagram(worlds: pd.DataFrame) -> str:
    """The diagram as HTML, which `diagram.js` draws. Columns of `worlds`: slice, seed, seeds, and those named above."""
    columns = {name: _plain(worlds[name]) for name in ("slice", "seed", "seeds", *PARAMETERS, *FOUND)}
    defaults = {field.name: field.default for field in fields(World) if field.default is not MISSING}
    data = {"slices": SLICES, "parameters": PARAMETERS, "found": FOUND, "worlds": columns, "defaults": defaults}
    return (
        f'<div class="diagram" data-worlds="{html.escape(json.dumps(data, allow_nan=False, separators=(",", ":")))}">'
        '<p><label>Slice <select class="slice"></select></label> <label>Share <select class="share"></select></label></p>'
        '<div class="panels"></div><div class="world" aria-live="polite"></div>'
        "<noscript>This diagram needs JavaScript.</noscript></div>"
    )


def _plain(column: pd.Series) -> list:
    """Values for JSON, shares rounded to what is shown and one digit more, and null for what is not there."""
    return [None if pd.isna(value) else round(value, 4) if isinstance(value, float) else value for value in column.tolist()]
