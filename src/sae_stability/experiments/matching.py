"""How alike the features of the seeds are, by every criterion: all that does not depend on the threshold."""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from sae_stability.experiments import quality
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import save_tensors
from sae_stability.matching import CRITERIA, Stability, by_every_criterion, nearest_within

PARTS = ("best_cosine", "partner", "runner_up")


def compute(results: Results, folder: Path) -> None:
    """Find what each feature of each seed is most like in every other one, in the ensemble and in its nulls."""
    for kind in results.cell.kinds:
        read, alive = encoded(results, kind), quality.alive(results, kind)
        W_dec, W_enc, covariance = read.ensemble.W_dec, read.ensemble.W_enc, read.activations.covariance
        # No cosine depends on a threshold: it is given when they are read.
        by_criterion = by_every_criterion(W_dec, W_enc, read.matrices(), covariance, 1.0, alive)
        tensors = {f"{name}/{part}": getattr(each, part).clone() for name, each in by_criterion.items() for part in PARTS}
        nearest = [nearest_within(directions, living) for directions, living in zip(W_dec, alive, strict=True)]
        save_tensors(folder / f"{kind}.safetensors", {**tensors, "nearest_within": torch.stack(nearest)}, {})


def stability(results: Results, kind: str = "real", criterion: str = "decoder") -> Stability:
    """The stability of the live features of an ensemble by one of `CRITERIA`, at the cell's threshold."""
    return opened(results.folder("matching") / f"{kind}.safetensors", results.cell.threshold, criterion)


def opened(path: Path, threshold: float, criterion: str = "decoder") -> Stability:
    """The same from the file that `compute` wrote. What is dead, or too rare for a criterion, has no best cosine."""
    tensors = _load(path)
    best_cosine, partner, runner_up = (tensors[f"{criterion}/{part}"] for part in PARTS)
    return Stability(best_cosine, partner, runner_up, (~best_cosine.isnan()).any(1), threshold)


def by_criterion(results: Results, kind: str = "real") -> dict[str, Stability]:
    return {criterion: stability(results, kind, criterion) for criterion in CRITERIA}


def nearest(results: Results, kind: str = "real") -> torch.Tensor:
    """The best cosine of each feature with another one of its own dictionary, [seed, d_sae]."""
    return _load(results.folder("matching") / f"{kind}.safetensors")["nearest_within"]


@lru_cache(maxsize=8)
def _load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


EXPERIMENT = Experiment("matching", compute, after=("quality",), reads=("evaluation_tokens",))
