"""A comparison as one JSON file that other tools read; `report.schema.json` says what is in it."""

import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from sae_stability.existing.comparison import Comparison
from sae_stability.saes.reading import Loaded
from sae_stability.statistics import Interval

SCHEMA = "sae-stability.comparison"
VERSION = 1
"""Of the schema: it rises where a field changes its meaning or goes. New fields may come without."""
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def report(compared: Comparison) -> dict:
    """All of a comparison as JSON values; what is not defined is null, and features are counted from 0.

    `matches` holds, for each ordered pair of SAEs, each feature's best cosine in the other SAE, whose that is, and the second best.
    """
    found = compared.found
    saes = []
    for name, sae in zip(compared.names, compared.saes, strict=True):
        about = sae.about if isinstance(sae, Loaded) else None
        saes.append(
            {
                "name": name,
                "path": None if about is None else str(about.path),
                "features": len(sae.directions),
                "model": None if about is None else about.model,
                "hook_name": None if about is None else about.hook_name,
                "directions_only": None if about is None else about.encoder,
            }
        )
    latent = compared.latent_shares if found.trials > 1 and found.counts.any() else {}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "made_with": {name: version(name) for name in ("sae-stability", "torch", "numpy")},
        "threshold": found.threshold,
        "d_in": compared.d_in,
        "tokens": None if compared.firings is None else compared.firings.tokens,
        "saes": saes,
        "mean_stability": _interval(found.mean()),
        "chance": _number(compared.chance),
        "pw_mcc": _number(compared.mcc),
        "bands": {band: _interval(share) for band, share in found.shares().items()},
        "latent_shares": {band: _interval(share) for band, share in latent.items()},
        "notes": compared.notes,
        "features": [
            {
                "sae": name,
                "alive": found.alive[s, : len(sae.directions)].tolist(),
                "stability": _numbers(found.probability[s, : len(sae.directions)]),
                "firings": None if compared.firings is None else compared.firings.counts[s, : len(sae.directions)].tolist(),
            }
            for s, (name, sae) in enumerate(zip(compared.names, compared.saes, strict=True))
        ],
        "matches": [
            {
                "of": one,
                "in": other,
                "cosine": _numbers(found.best_cosine[s, t, : len(compared.saes[s].directions)]),
                "partner": [p if p >= 0 else None for p in found.partner[s, t, : len(compared.saes[s].directions)].tolist()],
                "runner_up": _numbers(found.runner_up[s, t, : len(compared.saes[s].directions)]),
            }
            for s, one in enumerate(compared.names)
            for t, other in enumerate(compared.names)
            if s != t
        ],
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"value": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: torch.Tensor) -> list[float | None]:
    """Six digits tell all that float32 products do."""
    return [None if math.isnan(value) else value for value in np.round(values.double().numpy(), 6).tolist()]
