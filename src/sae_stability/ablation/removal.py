"""The effect of removing sets of features, or of keeping them only.

In the primary reading codes stay as they are and so does the SAE's error: the model sees x - sum of a_i d_i over the set. The
full splice puts the reconstruction without the set in the place of x. For reconstruction there is a third reading: codes are
chosen again among the features that are left, by matching pursuit whatever the variant, and their decoder is fitted again by
least squares, since at an optimum the first reading gives back what the features write (PAPER, Function).
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability import threads
from sae_stability.ablation.controls import Name
from sae_stability.ablation.refitting import refitted
from sae_stability.evaluation import Encoded
from sae_stability.language.activations import Activations
from sae_stability.language.interventions import Predictions, Reading, intervene
from sae_stability.methods.pursuit import matching_pursuit
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.squares import squared_errors

JUDGED = (
    100_000  # tokens at most on which refitted decoders are judged: what they are fitted on grows with the width, this need not
)

Key = TypeVar("Key", bound=Hashable)
Members = dict[Name, Bool[Tensor, "seed d_sae"]]


@dataclass(frozen=True)
class Residuals:
    """Squared errors in normalised units, summed over the tokens of each cluster."""

    total: Float[np.ndarray, "cluster"]
    """Of the mean activation."""
    intact: Float[np.ndarray, "seed cluster"]
    """Of the SAE with all its features."""
    removed: dict[Name, Float[np.ndarray, "seed cluster"]]
    """Without a set."""
    kept: dict[Name, Float[np.ndarray, "seed cluster"]]
    """With nothing but a set."""


def on_reconstruction(held_out: Encoded, cluster: Int[np.ndarray, "token"], members: Members) -> Residuals:
    """The squared error without each set and with nothing else, codes fixed. Activations come from `cluster`.

    The members of a set may be given for the first seeds only.
    """
    ensemble, activations = held_out.ensemble, held_out.activations
    kinds, cluster = np.unique(cluster[: len(activations)], return_inverse=True)
    total, intact = np.zeros(len(kinds)), np.zeros((len(ensemble.seeds), len(kinds)))
    removed, kept = ({name: np.zeros((len(member), len(kinds))) for name, member in members.items()} for _ in range(2))
    centre = (activations.mean - ensemble.mean) * ensemble.scale
    progress = tqdm(held_out.batches(), "removal, reconstruction", total=len(held_out.codes), unit="batch", disable=None)
    for rows, x, coded in progress:
        of = cluster[rows]

        def by_cluster(squares: Float[Tensor, "token"], of=of) -> Float[np.ndarray, "cluster"]:
            return np.bincount(of, squares.double().numpy(), len(kinds))

        total += by_cluster((x - centre).square().sum(1))
        for seed, (sae, codes) in enumerate(coded):
            without_features, sets = x - sae.b_dec, _of_seed(members, seed)
            error = without_features - codes.decode(sae.W_dec)
            intact[seed] += by_cluster(error.square().sum(1))
            if not sets:
                continue
            squares = squared_errors(without_features, error, codes, sae.W_dec, torch.stack(list(sets.values())))
            for name, without, alone in zip(sets, *squares, strict=True):
                removed[name][seed] += by_cluster(without)
                kept[name][seed] += by_cluster(alone)
    return Residuals(total, intact, removed, kept)


def reselected(
    ensemble: Ensemble,
    activations: Activations,
    cluster: Int[np.ndarray, "token"],
    alive: Bool[Tensor, "seed d_sae"],
    members: Members,
    device: torch.device | str = "cpu",
) -> Residuals:
    """The squared error without each set once codes are chosen again and the decoder is fitted again.

    Codes are chosen by one encoder for all variants, matching pursuit with k atoms among the live features that are left, since
    an SAE's own encoder was trained with the others in place. The decoder is fitted on every other cluster and judged on the
    rest, at most `JUDGED` tokens, with nothing removed (`intact`) as well as without each set. Both are done on `device`. Memory
    beside the codes is that of `matching_pursuit`, and then of `refitted`, for each seed at work: a device takes one at a time.
    """
    kinds, cluster = np.unique(cluster[: len(activations)], return_inverse=True)
    judged = cluster % 2 == 1
    read = ~judged | (judged.cumsum() <= JUDGED)
    cluster, judged = cluster[read], judged[read]
    x = ensemble.normalise(activations.data[torch.from_numpy(read)])
    target = x.numpy()
    total = np.bincount(cluster[judged], np.square(target[judged] - target[~judged].mean(0)).sum(1), len(kinds))
    without = {None: torch.zeros(len(ensemble.seeds), ensemble.d_sae, dtype=torch.bool), **members}

    def errors(seed: int) -> dict[Name | None, np.ndarray]:
        """Of one seed, by the set that it does without."""
        sae, live, found = ensemble.saes[seed], alive[seed], {}
        sets = {name: gone[live] for name, gone in _of_seed(without, seed).items()}
        directions = F.normalize(sae.W_dec, dim=1)[live].to(device)
        codes = matching_pursuit(x - sae.b_dec, directions, ensemble.k, torch.stack(list(sets.values())))
        for (name, gone), of_set in zip(sets.items(), codes, strict=True):
            predicted = refitted(*of_set, int((~gone).sum()), x, torch.from_numpy(judged)).numpy()
            found[name] = np.bincount(cluster[judged], np.square(target[judged] - predicted).sum(1), len(kinds))
        return found

    on_cpu = torch.device(device).type == "cpu"
    by_seed = threads.each_seed(errors, len(ensemble.seeds), "removal, chosen again", one_at_a_time=not on_cpu)
    seen = np.bincount(cluster[judged], minlength=len(kinds)) > 0
    intact, *removed = (np.stack([found[name][seen] for found in by_seed]) for name in without)
    return Residuals(total[seen], intact, dict(zip(members, removed, strict=True)), {})


def on_prediction(site: Reading, ensemble: Ensemble, members: Members, readings: dict[str, list[Name]]) -> Predictions:
    """What the model predicts without each set, on held-out tokens.

    `readings` says which sets are `removed` and `kept` (the error stays), `spliced` (the reconstruction without the set) and
    `only` (the reconstruction by nothing but the set). Interventions are named (reading, kind of set, band, position of the seed);
    `zero` and `mean` ablate the whole site. The members of a set may be given for the first seeds only.
    """

    def edits(x: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        yield ("zero",), torch.zeros_like(x)
        yield ("mean",), ensemble.mean.expand_as(x)
        for seed, (sae, codes) in enumerate(ensemble.codes(ensemble.normalise(x))):
            whole = codes.decode(sae.W_dec)
            reconstruction = ensemble.to_raw(whole + sae.b_dec)
            sets = _of_seed(members, seed)
            for name in (name for name in sets if any(name in names for names in readings.values())):
                written = codes.of(sets[name]).decode(sae.W_dec)
                bases = {
                    "removed": (x, written),
                    "kept": (x, whole - written),
                    "spliced": (reconstruction, written),
                    "only": (reconstruction, whole - written),
                }
                for reading, names in readings.items():
                    if name in names:
                        base, gone = bases[reading]
                        yield (reading, *name, seed), base - gone / ensemble.scale

    return intervene(site, edits, "removal, prediction")


def _of_seed(members: Mapping[Key, Bool[Tensor, "seed d_sae"]], seed: int) -> dict[Key, Bool[Tensor, "d_sae"]]:
    """The sets that are given for a seed."""
    return {name: member[seed] for name, member in members.items() if seed < len(member)}
