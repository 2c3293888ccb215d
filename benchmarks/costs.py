"""Publish what the stages of studies took here, on which estimates of others rest (B1): `make costs STUDIES="embedded quick"`."""

import platform
import sys

import pandas as pd

from sae_stability import costs, places
from sae_stability.files import write_json, write_table
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan
from sae_stability.store import git_commit, processor

if __name__ == "__main__":
    names = sys.argv[1:] or ["embedded", "quick"]
    commit = git_commit()  # before the tables change the tree
    jobs = pd.concat([costs.measured(Plan(load_study(name))).assign(study=name) for name in names])
    jobs = jobs.drop_duplicates("stage").reset_index(drop=True)  # what studies share
    folder = places.published() / "costs"
    write_table(folder / "jobs.parquet", jobs)
    made = {"commit": commit, "command": f'make costs STUDIES="{" ".join(names)}"', "machine": platform.machine()}
    write_json(folder / "jobs.json", made | {"processor": processor(), "rows": len(jobs), "seconds": round(jobs["seconds"].sum())})
