"""What removals of an ensemble's features were found to do, as shares of what removing all of them does."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_stability.ablation.controls import ALL, NONE, RETURNS, Name, Sets, sets_of
from sae_stability.ablation.impacts import Impacts
from sae_stability.ablation.removal import on_prediction, on_reconstruction, reselected
from sae_stability.evaluation import Encoded
from sae_stability.language.activations import Activations
from sae_stability.language.interventions import Reading
from sae_stability.language.models import device_of
from sae_stability.matching import BANDS, Stability

MEASURES = ("reconstruction", "reselected", "prediction", "divergence")
"""Squared error; the same once codes are chosen again; cross-entropy; KL divergence from the clean prediction."""
SOME = 4  # clusters of documents at least, half of which judge what was fitted on the others
REFITTED = 40  # tokens a feature on which decoders are fitted again
CHOSEN_AGAIN: tuple[Name, ...] = (
    *(ALL, ("random", "stable"), ("paired", "stable"), ("matched", "stable")),
    *(("band", band) for band in BANDS),
)
"""Sets without which codes are chosen again: each costs a fit of the decoder for every seed."""
UNMATCHED, MATCHED = ("all", "returns", "band", "random"), ("paired", "matched")
Detail = Literal["bands", "controls", "curves"]
"""Bands, what reappears and as many random features are removed, and kept alone; `controls` also match them, and choose codes
again; `curves` also add features in several orders, and read the full splice."""
COMPLEMENT = {"kept": "removed", "only": "spliced"}
"""Readings that keep nothing but a set, and those that remove one."""


@dataclass(frozen=True)
class Effects:
    """Sums over the tokens of each cluster, by measure, reading and set."""

    sums: dict[str, Float[np.ndarray, "*seed cluster"]]
    """`measure/reading/kind/band`, `measure/intact`, and `measure/size`, by which a raw change is divided; what does not
    depend on an SAE lacks the first axis."""

    def lost(self, measure: str, reading: str, name: Name) -> Float[np.ndarray, "seed cluster"]:
        """How much larger the measure is under an intervention than without."""
        removing = COMPLEMENT.get(reading, reading)
        start = self.sums[f"{measure}/spliced/none/"] if removing == "spliced" else self.sums[f"{measure}/intact"]
        end = self.sums[f"{measure}/{reading}/{'/'.join(name)}"]
        return end - (start[: len(end)] if start.ndim == 2 else start)  # curves are those of the first seeds

    def carried(self, measure: str, reading: str, name: Name) -> Float[np.ndarray, "seed cluster"]:
        """What a set carries: what is lost without it, or, where only the set is kept, what is not lost."""
        if reading in COMPLEMENT:
            lost = self.lost(measure, reading, name)
            return self.lost(measure, COMPLEMENT[reading], ALL)[: len(lost)] - lost
        return self.lost(measure, reading, name)

    @property
    def curves(self) -> bool:
        """Whether features were also added in several orders."""
        return any("/by " in name for name in self.sums)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as flat tensors, for a file."""
        return {name: torch.from_numpy(of) for name, of in self.sums.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Effects":
        """From what `tensors` gave."""
        return cls({name: of.numpy() for name, of in tensors.items()})


def measure(
    held_out: Encoded,
    impacts: Impacts,
    stability: Stability,
    cluster: Int[np.ndarray, "token"],
    site: Reading,
    *,
    refitted_on: Activations,
    detail: Detail,
) -> tuple[Effects, Sets]:
    """Remove the bands of an ensemble and their controls, and read what is lost.

    Reconstruction is judged on `held_out`, whose rows come from `cluster`, and prediction without a set at `site`. Matches follow
    the energies and firings of `impacts`. Where codes are chosen again, decoders are fitted on as many tokens of `refitted_on` as
    they need, which begins with those of `held_out`.
    """
    ensemble = held_out.ensemble
    sets = sets_of(stability, impacts.energy, impacts.firings, detail == "curves")
    sums: dict[str, np.ndarray] = {}
    residuals_of = {"reconstruction": on_reconstruction(held_out, cluster, sets.members)}
    if detail != "bands":
        again = {name: sets.members[name] for name in CHOSEN_AGAIN}
        begins = np.sort(np.unique(cluster, return_index=True)[1])[:SOME]  # of long documents it takes more to judge on others
        tokens = refitted_on.first(max(2 * REFITTED * ensemble.d_sae, int(begins[-1]) + 1))
        residuals_of["reselected"] = reselected(ensemble, tokens, cluster, sets.members[ALL], again, device_of(site.bridge))
    for measure_name, residuals in residuals_of.items():
        sums |= {f"{measure_name}/intact": residuals.intact, f"{measure_name}/size": residuals.total}
        for reading, of in (("removed", residuals.removed), ("kept", residuals.kept)):
            sums |= {f"{measure_name}/{reading}/{'/'.join(name)}": errors for name, errors in of.items()}
    readings = readings_of(sets, detail)
    predicted = on_prediction(site, ensemble, sets.members | {NONE: stability.alive & False}, readings)
    for measure_name, of, intact in (
        ("prediction", predicted.nats, predicted.clean),
        ("divergence", predicted.divergence, np.zeros_like(predicted.clean)),
    ):
        sums |= {f"{measure_name}/intact": intact, f"{measure_name}/size": predicted.tokens.astype(float)}
        sums |= {f"{measure_name}/{ablation}": of[ablation,] for ablation in ("zero", "mean")}
        for reading, names in readings.items():
            for name in names:
                by_seed = np.stack([of[(reading, *name, seed)] for seed in range(len(sets.members.get(name, stability.alive)))])
                sums[f"{measure_name}/{reading}/{'/'.join(name)}"] = by_seed
    return Effects(sums), sets


def readings_of(sets: Sets, detail: Detail) -> dict[str, list[Name]]:
    """Which sets are read how in prediction: each costs a pass of the model for every seed."""
    of_kind = {kind: [name for name in sets.members if name[0].startswith(kind)] for kind in (*UNMATCHED, *MATCHED, "by ")}
    removed = [name for kind in UNMATCHED for name in of_kind[kind]]
    kept = [RETURNS, ("random", "returns"), *of_kind["band"]]
    if detail == "bands":
        return {"removed": removed, "kept": kept}
    removed += [name for kind in MATCHED for name in of_kind[kind]]
    readings = {"removed": removed, "kept": kept + of_kind["by "]}
    if detail == "curves":
        readings |= {"spliced": [NONE, ALL, *of_kind["band"]], "only": of_kind["band"]}
    return readings


def sample(impacts: Impacts, sets: Sets, count: int) -> Int[Tensor, "1 chosen"]:
    """Up to `count` features of each band of the first seed, spread evenly over the ranks of their impact on prediction."""
    chosen = []
    for band in BANDS:
        features = sets.members["band", band][0].nonzero()[:, 0]
        ranked = features[impacts.on_prediction[0, features].argsort(stable=True)]
        if len(ranked):
            chosen.append(ranked[np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))])
    return torch.cat(chosen)[None]
