"""Measure how often nominal 95 % intervals hold the truth, and publish it: `make coverage`."""

import pandas as pd

from sae_stability import places
from sae_stability.coverage import coverage
from sae_stability.files import write_json
from sae_stability.store import git_commit

DRAWS = {4: 1000, 11: 1000, 21: 400}
"""Simulated studies, by their number of seeds."""

if __name__ == "__main__":
    rows = pd.concat([coverage(seeds, draws) for seeds, draws in DRAWS.items()])
    measured = {"commit": git_commit(), "command": "make coverage", "rows": rows.round(4).to_dict("records")}
    write_json(places.published() / "coverage" / "coverage.json", measured)
