"""Measure how often nominal 95 % intervals hold what they should in simulated studies, and publish it: `make intervals`."""

import pandas as pd

from sae_stability import places
from sae_stability.files import write_json
from sae_stability.simulation import coverage
from sae_stability.store import git_commit

DRAWS = {4: 1000, 11: 400, 21: 200}
"""Simulated studies, by their number of seeds."""

if __name__ == "__main__":
    rows = pd.concat([coverage(seeds, draws) for seeds, draws in DRAWS.items()])
    measured = {"commit": git_commit(), "command": "make intervals", "rows": rows.round(4).to_dict("records")}
    write_json(places.published() / "intervals" / "intervals.json", measured)
