"""What became of a seed's features in the next seed (main cell): regressed on its latents, and their contribution transplanted."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file

from sae_stability import ablation
from sae_stability.ablation.translation import TRANSPLANTS
from sae_stability.experiments import ensembles, impacts, matching, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import save_arrays, write_table
from sae_stability.matching import BANDS
from sae_stability.statistics import over_pairs, resampled

TRANSLATED = ("stable", "unstable")
SPARED = "transplanted less removed"
"""What another seed's contribution spares, in the same pair and on the same text, of what it costs to have none."""


def compute(results: Results, folder: Path) -> None:
    """Translate the stable and the unstable features of each seed into the next one's, and let the model read the next one's."""
    site = texts.reading(results, results.study.ablation_tokens)
    ensemble, alone = ensembles.ensemble(results), impacts.single(results).impacts
    held_out_band = torch.from_numpy(matching.stability(results).held_out_band)
    members = {band: held_out_band == BANDS.index(band) for band in TRANSLATED}
    cluster = site.contexts.cluster[site.contexts.is_text]
    write_table(folder / "translation.parquet", ablation.translate_to_next(encoded(results), cluster, members))
    for band, member in members.items():
        moved = ablation.transplant(site, ensemble, member, alone.activation / alone.rows)
        by_seed = {what: np.stack([moved.nats[what, seed] for seed in range(len(ensemble.seeds))]) for what in TRANSPLANTS}
        save_arrays(folder / f"transplant-{band}.safetensors", {"intact": moved.clean, "size": moved.tokens, **by_seed})


def translations(results: Results) -> pd.DataFrame:
    """What became of the stable and the unstable features of each seed in the next seed."""
    return pd.read_parquet(results.folder("translation") / "translation.parquet")


def transplants(results: Results) -> pd.DataFrame:
    """What the model loses where a band's contribution is removed, averaged, or written by another seed: nats a token.

    A number a pair of seeds that follow one another, whose bands are those of the other seeds; to leave a seed out is to leave its
    pairs out. `SPARED` is a difference within pairs.
    """
    rows = []
    for band in TRANSLATED:
        sums = load_file(results.folder("translation") / f"transplant-{band}.safetensors")
        losses = {what: sums[what] - sums["intact"] for what in TRANSPLANTS}
        losses[SPARED] = sums["transplanted"] - sums["removed"]
        for what, lost in losses.items():
            by_pair = np.full((len(lost), len(lost)), np.nan)
            by_pair[np.arange(len(lost)), (np.arange(len(lost)) + 1) % len(lost)] = lost.sum(1) / sums["size"].sum()
            weights = resampled(lost.shape[1])
            change = over_pairs(by_pair, (weights @ lost.mean(0)) / (weights @ sums["size"]))
            rows.append({"band": band, "what": what, **interval_columns("change", change)})
    return pd.DataFrame(rows)


EXPERIMENT = Experiment(
    "translation",
    compute,
    after=("impacts",),
    reads=("threshold", "evaluation_tokens", "ablation_tokens"),
    tables={"translations": translations, "transplants": transplants},
    asked=is_main,
)
