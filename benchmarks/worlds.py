"""Train SAEs on worlds with known features, and publish what they found: `make worlds`.

`worlds` are those of the phase diagram, `latents` the unstable latents of the reverse test, `pools` what pools of seeds find. Each
can be made alone, by its name.
"""

import platform
import sys
import time
from collections.abc import Callable

import pandas as pd

from sae_stability import places
from sae_stability.diagnostics import all_unstable_latents
from sae_stability.experiments.synthetic import (
    DIAGRAM_SEEDS,
    MIXED_SEEDS,
    POOLED_SEEDS,
    mixed_worlds,
    phase_diagram,
    pooled_worlds,
)
from sae_stability.files import write_json, write_table
from sae_stability.recovery import pooled_all
from sae_stability.store import git_commit
from sae_stability.synthetic import measure_all


def worlds() -> pd.DataFrame:
    """One row a world of the phase diagram, with its slice."""
    slices = phase_diagram()
    found = measure_all([world for each in slices.values() for world in each], DIAGRAM_SEEDS, "phase diagram")
    return found.assign(slice=[name for name, each in slices.items() for _ in each])


def latents() -> pd.DataFrame:
    """One row an unstable latent of the worlds in which there are several kinds."""
    return all_unstable_latents(mixed_worlds(), MIXED_SEEDS, "reverse test")


def pools() -> pd.DataFrame:
    """One row a product of each world, with its kind."""
    kinds = pooled_worlds()
    of_world = [kind for kind, worlds in kinds.items() for _ in worlds]
    found = pooled_all([world for worlds in kinds.values() for world in worlds], POOLED_SEEDS, "pools")
    return found.assign(kind=[of_world[number] for number in found["world"]])


TABLES: dict[str, Callable[[], pd.DataFrame]] = {"worlds": worlds, "latents": latents, "pools": pools}

if __name__ == "__main__":
    commit = git_commit()  # before the tables change the tree
    for name in sys.argv[1:] or TABLES:
        started, table = time.monotonic(), TABLES[name]()
        folder = places.published() / "worlds"
        write_table(folder / f"{name}.parquet", table)
        made = {"commit": commit, "command": "make worlds", "machine": platform.machine(), "rows": len(table)}
        write_json(folder / f"{name}.json", made | {"seconds": round(time.monotonic() - started)})
