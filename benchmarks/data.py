"""Computes the activations that the benchmark trains on: of the embedded model, with the locked environment's corpus."""

from sae_stability import pipeline
from sae_stability.experiments import texts
from sae_stability.language.activations import Activations
from sae_stability.loading import load_study
from sae_stability.study import Study

TOKENS, HELD_OUT = 400_000, 60_000


def study() -> Study:
    return load_study(
        "embedded", [f"tokens={TOKENS}", f"evaluation_tokens={HELD_OUT}", "nulls=[surrogate]", "grid={}"], "benchmark"
    )


def open_activations(split: str) -> Activations:
    """Activations of the `train` or the `evaluation` split."""
    return texts.activations(pipeline.Plan(study()).results(study().main), split)


if __name__ == "__main__":
    pipeline.compute_activations(study())
