"""Tables of what features fire on."""

import pandas as pd

from sae_stability.results import explanations_of, triggers_of
from sae_stability.store import Store
from sae_stability.triggers import at_equal_frequency, compare


def triggers(store: Store, cell: str) -> pd.DataFrame:
    """One row per live feature: what tells when it fires, and whether it is among those compared at equal frequency."""
    table = triggers_of(store, cell)
    chosen = pd.concat([at_equal_frequency(part) for _, part in table.groupby("seed")]).index
    return table.assign(cell=cell, equal_frequency=table.index.isin(chosen))


def deltas(store: Store, cell: str) -> pd.DataFrame:
    """One row per quantity: how unstable features differ from stable ones."""
    return compare(triggers_of(store, cell)).assign(cell=cell)


def explanations(store: Store) -> pd.DataFrame:
    """One row per engine and explained feature of the main cell: what is said, and how well it tells where the feature fires."""
    return explanations_of(store)
