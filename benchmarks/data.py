"""Computes the activations that the benchmark trains on: of the embedded model, with the locked environment's corpus.

The peers' environment only reads them, from where `PLACE` says: its packages are others, and the corpus is made of packages.
"""

from sae_stability import places
from sae_stability.files import read_json, write_json
from sae_stability.language.activations import Activations

TOKENS, HELD_OUT = 400_000, 60_000
PLACE = places.results() / "benchmark" / "activations.json"


def open_activations(split: str) -> Activations:
    """Activations of the `train` or the `evaluation` split."""
    folder, tokens = places.root() / read_json(PLACE)["folder"], {"train": TOKENS, "evaluation": HELD_OUT}[split]
    cached = Activations.open(folder / f"{split}.bin")
    return cached.normalised_by_first(min(tokens, len(cached)))


def main() -> None:
    from sae_stability import pipeline
    from sae_stability.loading import load_study

    overrides = [f"tokens={TOKENS}", f"evaluation_tokens={HELD_OUT}", "nulls=[surrogate]", "grid={}", "model_dtype=float32"]
    results = pipeline.compute_activations(load_study("embedded", overrides, "benchmark"))
    write_json(PLACE, {"folder": str(results.folder("activations/real").relative_to(places.root()))})


if __name__ == "__main__":
    main()
