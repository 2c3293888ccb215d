"""Whole studies through the command line: other models and corpora, kills, two clean runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

COMMAND = [sys.executable, "-c", "from sae_stability.cli import main; main()"]


def run(house: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"SAE_STABILITY_ROOT": str(house)}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True, cwd=house.parent, check=False
    )


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_other_architectures_reach_their_claims(house, small, model_folders, architecture, monkeypatch):
    from sae_stability import pipeline, store
    from sae_stability.config import load_study

    monkeypatch.setattr(store, "ROOT", house)
    overrides = [override.removeprefix("--set=") for override in small] + [f"model={model_folders[architecture]}"]
    found = pipeline.compute(load_study("embedded", overrides, name=architecture))
    assert [claim["id"] for claim in found.claims()][:2] == ["C1", "C2"]
    assert architecture in found.claims()[0]["cell"]
    assert found.table("saes")["loss_spliced"].gt(0).all()


def test_another_model_and_corpus_become_a_book_and_the_book_follows_the_study(house, small):
    for name, seeds in (("other", 4), ("again", 3)):
        done = run(house, "run", "embedded", *small, f"--set=seeds={seeds}", "--name", name)
        assert done.returncode == 0, done.stderr
        index = (house / "_build" / "html" / "index.html").read_text(encoding="utf-8")
        assert f"trains {seeds} SAEs" in " ".join(index.split()).replace("<em>", "").replace("</em>", "")
        assert (house / "results" / name / "chapters" / "stability.ipynb").exists()
    second = run(house, "run", "embedded", *small, "--set=seeds=3", "--name", "again")
    assert second.stdout.splitlines() == [str(house / "_build" / "html" / "index.html")]  # nothing was computed again


COMPUTE = """
import sys
from sae_stability import pipeline
from sae_stability.config import load_study
pipeline.compute(load_study("embedded", sys.argv[2:], name=sys.argv[1]))
"""


def test_killed_at_any_moment_the_claims_are_those_of_an_undisturbed_run(house, small):
    # More passes than the other tests take, so that kills fall into training too.
    overrides = [*(override.removeprefix("--set=") for override in small), "passes=12"]
    options = {"env": os.environ | {"SAE_STABILITY_ROOT": str(house)}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    commands = {name: [sys.executable, "-c", COMPUTE, name, *overrides] for name in ("calm", "killed")}
    started = time.monotonic()
    subprocess.run(commands["calm"], check=True, **options)
    seconds = time.monotonic() - started
    generator = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(commands["killed"], start_new_session=True, **options)
        time.sleep(generator.uniform(0.3, 0.95) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(commands["killed"], check=True, **options)
    calm, killed = ((house / "results" / name / "claims.json").read_bytes() for name in ("calm", "killed"))
    assert calm == killed


def test_a_grid_gives_a_row_for_each_cell(house, small, monkeypatch):
    from sae_stability import pipeline, store
    from sae_stability.config import load_study

    monkeypatch.setattr(store, "ROOT", house)
    overrides = [override.removeprefix("--set=") for override in small]
    sites = "grid.hook_name=[blocks.0.hook_resid_post, blocks.1.hook_mlp_out]"
    study = load_study("embedded", [*overrides, sites, "seeds=2", "surrogate_seeds=2"], name="grid")
    table = pipeline.compute(study).table("cells")
    assert table["cell"].tolist() == ["main", "hook_name=blocks.0.hook_resid_post", "hook_name=blocks.1.hook_mlp_out"]
    assert table["label"].str.contains("hook_mlp_out").sum() == 1
    assert len({path.parent.name for path in (house / "results" / "grid").rglob("train.bin")}) == 3


def test_the_quick_study_is_consistent(quick):
    features, saes = (quick.table(name).query("cell == 'main'") for name in ("features", "saes"))
    real = features[features["kind"] == "real"]
    assert len(real) == quick.study.d_sae * len(quick.study.seed_list)
    assert (real["alive"] == (real["frequency"] > 0)).all()
    assert real.groupby("seed")["frequency"].sum().sub(saes.set_index("seed")["l0"]).abs().max() < 1e-4
    live = real[real["alive"]]
    assert (live["stability"] == (live["matches"] / live["trials"]).astype("float32")).all()
    assert live["stability"].between(live["stability_low"], live["stability_high"]).all()
    assert (saes["explained_variance"] > 0.5).all()
    assert (saes["loss_clean"] < saes["loss_zero_ablated"]).all()
    assert saes["loss_recovered"].between(0.5, 1.01).all()
    examples = quick.table("examples")
    assert (examples.loc[examples["offset"] == 0, "activation"] > 0).all()
    assert set(examples["feature"]) <= set(live.loc[live["seed"] == 0, "feature"])


def test_cells_are_compared_at_equal_l0_and_at_equal_quality(quick):
    cells = quick.table("cells").set_index("variant", drop=False)
    assert set(cells["variant"]) == {"topk", "batchtopk", "gated"}
    assert ((cells["l0"] - cells["k"]).abs() <= 0.05 * cells["k"]).eq(cells["l0_on_target"]).all()
    main = cells[cells["cell"] == "main"].iloc[0]
    assert main["l0_at_equal_quality"] == pytest.approx(main["l0"])  # the main cell sets the quality
    for _, other in cells[cells["cell"] != "main"].dropna(subset="l0_at_equal_quality").iterrows():
        # Whoever explains more at its own L0 needs fewer features for the same.
        assert (other["explained_variance"] > main["explained_variance"]) == (other["l0_at_equal_quality"] < other["l0"])
    for name in ("features", "saes", "curve", "growth", "thresholds"):
        flagged = quick.table(name).set_index("cell")["cell_on_target"]
        assert (flagged == flagged.index.map(cells.set_index("cell")["l0_on_target"])).all()
    assert (cells["coefficient"] > 0).eq(cells["variant"] == "gated").all()


def test_a_stage_is_computed_again_when_what_it_depends_on_changes():
    from sae_stability import pipeline
    from sae_stability.config import load_study

    def keys(*overrides: str) -> dict[str, str]:
        return {stage.name: stage.key for stage in pipeline.plan(load_study("quick", ["grid={}", *overrides]))}

    def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return {name for name in before if before[name] != after.get(name)}

    cached, streamed = keys(), keys("stream=true")
    trained = {name for name in cached if name.startswith("cells/")}
    assert trained <= changed(cached, keys("device=cuda"))
    judged = {*(f"cells/main/{stage}" for stage in ("matching", "triggers", "explanations", "ablation")), "tables"}
    assert changed(cached, keys("surrogate_seeds=3")) == {"cells/main/surrogate", "cells/main/evaluation", *judged}
    assert changed(cached, keys("threshold=0.6")) == judged
    stream = next(name for name in streamed if name.startswith("streams/"))
    assert {stream, "cells/main/evaluation", "tables"} <= changed(streamed, keys("stream=true", "dtype=float32"))


def test_tables_read_anywhere(quick):
    for path in (quick.folder / "tables").glob("*.parquet"):
        assert len(pd.read_parquet(path)) > 0
    provenance = json.loads((quick.folder / "tables" / "provenance.json").read_text())
    assert {"key", "study_sha256", "versions", "commit", "device", "seconds", "peak_memory_gb", "files"} <= set(provenance)
    assert provenance["study"]["seeds"] == quick.study.seeds
