"""Train SAEs on the worlds of the phase diagram, and publish what they found: `make worlds`."""

import platform
import time

from sae_stability import places
from sae_stability.experiments.synthetic import DIAGRAM_SEEDS, phase_diagram
from sae_stability.files import write_json, write_table
from sae_stability.store import git_commit
from sae_stability.synthetic import measure_all

if __name__ == "__main__":
    slices, started, commit = phase_diagram(), time.monotonic(), git_commit()  # before the tables change the tree
    worlds = measure_all([world for each in slices.values() for world in each], DIAGRAM_SEEDS, "phase diagram")
    worlds = worlds.assign(slice=[name for name, each in slices.items() for _ in each])
    folder = places.published() / "worlds"
    write_table(folder / "worlds.parquet", worlds)
    made = {"commit": commit, "command": "make worlds", "machine": platform.machine(), "worlds": len(worlds)}
    write_json(folder / "provenance.json", made | {"seconds": round(time.monotonic() - started)})
