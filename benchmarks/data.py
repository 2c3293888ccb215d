"""Computes the activations that the benchmark trains on: of the embedded model, with the locked environment's corpus."""

from sae_stability import pipeline
from sae_stability.config import Study, load_study
from sae_stability.language.activations import Activations
from sae_stability.results import activations_of, sources_of
from sae_stability.store import Store

TOKENS, HELD_OUT = 400_000, 60_000


def study() -> Study:
    return load_study("embedded", [f"tokens={TOKENS}", f"evaluation_tokens={HELD_OUT}", "grid={}"], "benchmark")


def open_activations(split: str) -> Activations:
    """Activations of the `train` or the `evaluation` split."""
    of = study()
    return activations_of(Store(of), sources_of(of)["main"], of.cells["main"], split)


if __name__ == "__main__":
    pipeline.compute_activations(study())
