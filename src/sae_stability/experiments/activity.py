"""The same feature, the same tokens? How far features that match by direction also fire on the same tokens, equally strongly."""

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from safetensors.numpy import load_file
from scipy import sparse
from tqdm import tqdm

from sae_stability.experiments import ensembles, matching
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import each_kind, interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import save_arrays
from sae_stability.matching import BANDS
from sae_stability.matching.pairs import FEWEST, firings
from sae_stability.statistics import jackknife

KINDS = ["real", "surrogate"]


def compute(results: Results, folder: Path) -> None:
    """Correlate the activations of each feature with those of the one that is most like it by direction, in every other seed."""
    for kind in KINDS:
        codes = [matrix.tocsc() for matrix in encoded(results, kind).matrices()]
        partner = matching.stability(results, kind).partner.numpy()
        correlation = np.full(partner.shape, np.nan, dtype=np.float32)
        pairs = [(s, t) for s in range(len(codes)) for t in range(len(codes)) if s != t]
        for s, t in tqdm(pairs, "activity", unit="pair", disable=None):
            correlation[s, t] = partner_correlations(codes[s], codes[t], partner[s, t])
        save_arrays(folder / f"{kind}.safetensors", {"correlation": correlation})


def partner_correlations(
    ours: sparse.csc_array, theirs: sparse.csc_array, partner: Int[np.ndarray, "d_sae"]
) -> Float[np.ndarray, "d_sae"]:
    """Pearson's correlation of each column [token, feature] of one SAE with its partner among those of another, on the same tokens.

    NaN without a partner (-1), and where one of the two fires too rarely to tell (`pairs.FEWEST`).
    """
    paired = theirs[:, np.maximum(partner, 0)]
    tokens = ours.shape[0]
    means = [np.asarray(matrix.sum(0)).ravel() / tokens for matrix in (ours, paired)]
    squares = [np.asarray(matrix.multiply(matrix).sum(0)).ravel() / tokens for matrix in (ours, paired)]
    across = np.asarray(ours.multiply(paired).sum(0)).ravel() / tokens - means[0] * means[1]
    variances = [np.maximum(square - mean**2, 0) for square, mean in zip(squares, means, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = across / np.sqrt(variances[0] * variances[1])
    often = [firings(matrix) >= FEWEST for matrix in (ours, paired)]
    return np.where((partner >= 0) & often[0] & often[1] & (variances[0] > 0) & (variances[1] > 0), correlation, np.nan)


def correlations(results: Results, kind: str) -> Float[np.ndarray, "seed seed d_sae"]:
    """[s, t, i]: the correlation of feature i of seed s with its partner in seed t; NaN where t is s."""
    return load_file(results.folder("activity") / f"{kind}.safetensors")["correlation"]


def activity(results: Results) -> pd.DataFrame:
    """One row per feature that matches in another seed: cosine and correlation with its matches, on average over these."""

    def rows(kind: str) -> pd.DataFrame:
        matched, correlation = matching.stability(results, kind), correlations(results, kind)
        known = matched.matched.numpy() & np.isfinite(correlation)
        count = known.sum(1)
        seed, feature = np.nonzero(count)
        means = [
            np.where(known, values, 0).sum(1)[seed, feature] / count[seed, feature]
            for values in (matched.best_cosine.numpy(), correlation)
        ]
        return pd.DataFrame(
            {
                "seed": np.array(ensembles.ensemble(results, kind).seeds)[seed],
                "feature": feature,
                "band": np.array([*BANDS, "dead"])[matched.band[seed, feature]],
                "matches": count[seed, feature],
                "cosine": means[0],
                "correlation": means[1],
            }
        )

    return each_kind(KINDS, rows)


def agreement(results: Results) -> pd.DataFrame:
    """One row per kind, jackknifed over seeds: what matches have in common on average.

    Columns: `cosine`, `correlation`, and `strong_share`: of the matches that correlate as strongly as the threshold asks of
    directions.
    """

    def row(kind: str) -> pd.DataFrame:
        matched, correlation = matching.stability(results, kind), correlations(results, kind)
        known = matched.matched.numpy() & np.isfinite(correlation)
        quantities = {
            "cosine": matched.best_cosine.numpy(),
            "correlation": correlation,
            "strong_share": (correlation >= matched.threshold).astype(float),
        }

        def mean(values: Float[np.ndarray, "seed seed d_sae"]):
            sums, sizes = np.where(known, values, 0).sum(2, dtype=np.float64), known.sum(2)

            def estimate(seeds: list[int]) -> float:
                pairs = np.ix_(seeds, seeds)
                return float(sums[pairs].sum() / sizes[pairs].sum()) if sizes[pairs].sum() else float("nan")

            return jackknife(estimate, len(sums))

        columns: dict[str, float] = {"matches": int(known.sum())}
        for name, values in quantities.items():
            columns |= interval_columns(name, mean(values))
        return pd.DataFrame([columns])

    return each_kind(KINDS, row)


EXPERIMENT = Experiment(
    "activity",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens"),
    tables={"activity": activity, "agreement": agreement},
)
