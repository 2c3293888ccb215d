"""Bands of the features in a table, and intervals of what is compared between them.

The bands of one seed are made of all the others, so they are derived again with each seed left out, and every number that a table
gives by band is jackknifed so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sae_stability.matching.reappearance import BANDS, Stability
from sae_stability.statistics import Interval, jackknife


@dataclass(frozen=True, eq=False)
class Banding:
    """The bands of an ensemble's features, for tables that know a feature by its `seed` and `feature`."""

    stability: Stability
    seeds: list[int]
    """The seed at each position of the ensemble."""

    def banded(self, features: pd.DataFrame, kept: list[int] | None = None) -> pd.DataFrame:
        """The features of the seeds that are kept (positions; by default all) with the column `band` that these alone give them."""
        kept = list(range(len(self.seeds))) if kept is None else kept
        place = features["seed"].map({self.seeds[position]: place for place, position in enumerate(kept)})
        there = features[place.notna()]
        band = self.stability.band_among(kept)[place.dropna().astype(int), there["feature"].to_numpy()]
        return there.assign(band=np.array([*BANDS, "dead"])[band])

    def jackknife(self, features: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> Interval:
        """A statistic of features and their bands, with its delete-one-seed interval. NaN ends where a seed less leaves no band."""
        return jackknife(lambda kept: statistic(self.banded(features, kept)), len(self.seeds))
