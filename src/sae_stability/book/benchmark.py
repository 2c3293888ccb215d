"""What the chapter on costs derives from the benchmark (`benchmarks/results.json`): our training beside that of other libraries."""

import pandas as pd

from sae_stability.experiments.quality import L0_TOLERANCE

PEERS = {
    "saelens": ("SAELens", "sae-lens"),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning"),
    "sparsify": ("sparsify", "eai-sparsify"),
}
"""Libraries that others train SAEs with, as the benchmark calls them: their name, and that of their package."""

OURS = ("ours, 8 seeds", "ours, 4 seeds", "ours, 1 seed")


def peers(bench: dict) -> pd.DataFrame:
    """How many times as long as ours each peer takes in its fastest mode. Columns: name, version, times_ours."""
    rows = [
        {"name": name, "version": bench["versions"][package], "times_ours": bench["ratios"][peer]}
        for peer, (name, package) in PEERS.items()
    ]
    return pd.DataFrame(rows)


def step_times(times: pd.DataFrame, variant: str) -> pd.DataFrame:
    """The rows of `times` that are trainings of a variant; others are parts of the floor. Columns: variant, contestant, ms."""
    is_training = ~times["contestant"].str.startswith("product") & (times["contestant"] != "adam")
    return times[is_training & (times["variant"] == variant)]


def by_variant(times: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a step and seed: a row a variant, a column for each of `OURS` and for each peer in its fastest mode.

    NaN where a peer does not train the variant. Columns of `times`: variant, contestant, ms.
    """
    rows = []
    for variant, its in times.groupby("variant", sort=False):
        ours = its.set_index("contestant")["ms"][list(OURS)]
        fastest = {peer: its.loc[its["contestant"].str.startswith(peer), "ms"].min() for peer in PEERS}
        rows.append({"variant": variant, **ours, **fastest})
    return pd.DataFrame(rows)


def moved_by_bfloat16(bench: dict) -> pd.Series:
    """By how much explained variance differs between training in bfloat16 and in float32, by variant."""
    measured = pd.DataFrame(bench["bfloat16"]["quality"]).set_index("variant")
    return (measured["bfloat16"] - measured["float32"]).abs()


def gaps(quality: pd.DataFrame) -> pd.Series:
    """Explained variance of ours less that of SAELens, by variant, at an L0 within `L0_TOLERANCE` of theirs; NaN where none is.

    Columns: variant, contestant (`saelens`, or `ours, fastest` with the L0 that it was trained at), l0, explained_variance.
    """
    theirs = quality[quality["contestant"] == "saelens"].set_index("variant")
    ours = quality[quality["contestant"].str.startswith("ours, fastest")].set_index("variant")
    alike = (ours["l0"] / theirs["l0"].reindex(ours.index) - 1).abs() <= L0_TOLERANCE
    gap = (ours["explained_variance"] - theirs["explained_variance"].reindex(ours.index))[alike]
    return gap[~gap.index.duplicated(keep="last")].reindex(theirs.index)
