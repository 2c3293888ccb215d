"""Tidy tables of a study: what reappears (`stability`), what it does (`function`) and fires on (`triggers`)."""

from pathlib import Path

import pandas as pd

from sae_stability.config import Study
from sae_stability.results import kinds_of
from sae_stability.store import Store, write_table
from sae_stability.tables import function, stability, triggers
from sae_stability.tables.stability import L0_TOLERANCE, at_equal_seeds, features, on_target

__all__ = ["L0_TOLERANCE", "at_equal_seeds", "features", "on_target", "write"]

PER_KIND = {
    "features": stability.features,
    "families": stability.families,
    "unique": stability.unique,
    "curve": stability.curve,
    "growth": stability.growth,
}
PER_CELL = {
    "criteria": stability.criteria,
    "saes": stability.saes,
    "cells": stability.cells,
    "thresholds": stability.thresholds,
    "seeds": stability.by_seeds,
    "removals": function.removals,
    "sets": function.sets,
    "impact": function.impact,
    "triggers": triggers.triggers,
    "deltas": triggers.deltas,
}
MAIN_ONLY = {
    "examples": stability.examples,
    "single_removals": function.single_removals,
    "translations": function.translations,
    "transplants": function.transplants,
    "explanations": triggers.explanations,
}


def write(study: Study, folder: Path) -> None:
    """Write every table of the study to `folder`."""
    store = Store(study)
    whole = {
        **{
            name: pd.concat(
                [table(store, cell, kind) for cell, of in study.cells.items() for kind in kinds_of(of)], ignore_index=True
            )
            for name, table in PER_KIND.items()
        },
        **{name: pd.concat([table(store, cell) for cell in study.cells], ignore_index=True) for name, table in PER_CELL.items()},
    }
    hit = whole["cells"].set_index("cell")["l0_on_target"]
    for name, table in whole.items():  # a cell that misses its L0 is flagged wherever it appears
        write_table(folder / f"{name}.parquet", table.assign(cell_on_target=table["cell"].map(hit)))
    for name, table in MAIN_ONLY.items():
        write_table(folder / f"{name}.parquet", table(store))
