"""Studies as jobs, and what jobs are expected to cost."""

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation

from sae_stability import costs, pipeline, workflow
from sae_stability.figures.costs import stages
from sae_stability.loading import load_study, read_study
from sae_stability.saes import FASTEST, fastest_dtype

FEW = "experiments=[stability, function, triggers]"
SIZE = costs.Size(4000, 1000, 4, 32, 48, 4, 64, 36_864, 700)


@pytest.fixture
def single_seeds(monkeypatch):
    """Every training is too long for one job."""
    monkeypatch.setattr(workflow, "SECONDS_A_JOB", 1e-9)


def as_jobs(study, order: random.Random) -> list[workflow.Job]:
    """Compute a study by its jobs, each as the command line would, in an order drawn from those that their needs allow."""
    pipeline.check(study)
    waiting, done = workflow.jobs(pipeline.Plan(study)), list[workflow.Job]()
    while waiting:
        names = {job.name for job in done}
        ready = [job for job in waiting if set(job.after) <= names]
        job = order.choice(ready)
        number, _, parts = (job.part or "1/1").partition("/")
        pipeline.compute_stage(study, job.stage.name, int(number), int(parts))
        waiting.remove(job)
        done.append(job)
    return done


def took_what_their_provenance_says(plan: pipeline.Plan) -> None:
    found = costs.measured(plan).set_index("stage")
    stage = next(stage for stage in plan.stages if "ensembles" in stage.name and "-real-" in stage.name)
    row = found.loc[stage.name]
    assert (row["kind"], row["seeds"], row["tokens"], row["d_sae"], row["d_in"]) == ("training", 3, 2000, 48, 32)
    assert row["work"] == costs.work("training", costs.size(plan, stage))
    assert row["seconds"] == pytest.approx(sum(plan.store.provenance(entry)["seconds"] for entry in stage.entries))
    assert not found.index.str.endswith("report").any()


def test_jobs_compute_in_the_dtype_that_is_fastest_where_they_were_planned(small, house, monkeypatch):
    planned, jobs = pipeline.Plan(load_study("embedded", small, "study")), {}
    monkeypatch.setattr(workflow, "snakemake", lambda: "snakemake")
    monkeypatch.setattr(workflow, "write", lambda plan, arguments: plan.store.folder / "plan.json")
    monkeypatch.setattr(workflow.subprocess, "run", lambda *_, env, **__: jobs.update(env) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(workflow, "fastest_dtype", lambda device: torch.float32)
    workflow.run(planned, ["study"], 1, None)
    assert read_study(house / "study" / "study.json") == planned.study  # from the start, for who cleans in the meantime
    for device in ("cpu", "cuda"):  # whatever processor a job finds
        monkeypatch.setenv(FASTEST, jobs[FASTEST])
        assert fastest_dtype(torch.device(device)) == torch.float32


def test_jobs_in_any_order_that_they_allow_end_in_the_bytes_of_one_process(small, house, monkeypatch, single_seeds):
    # Of a variant with a penalty: the first seed finds its coefficient for the others.
    few = ["variant=gated", "seeds=3", "surrogate_seeds=2", "tokens=2000", "experiments=[stability]"]
    study = load_study("embedded", [*small, *few], "study")
    alone = pipeline.compute(study)
    took_what_their_provenance_says(pipeline.Plan(study))
    ledger = (alone.folder / "claims.json").read_bytes()
    trained = {path.relative_to(house): path.read_bytes() for path in house.rglob("ensemble.safetensors")}
    monkeypatch.setenv("SAE_STABILITY_RESULTS", str(house.parent / "jobs"))
    done = as_jobs(study, random.Random(1))
    assert [job.part for job in done if job.part].count("1/3") == 1
    assert sum(job.part != "" for job in done) == 3 + 2  # the seeds of the model and of its surrogate
    again = house.parent / "jobs"
    assert (again / "study" / "claims.json").read_bytes() == ledger
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("ensemble.safetensors")} == trained
    assert not [path for path in again.rglob(".part-*") if not path.name.endswith(".json")]


def test_the_plan_for_snakemake_names_each_stage_once_and_marks_what_is_done(small, house, tmp_path):
    arguments = ["embedded", *(f"--set={override}" for override in [*small, FEW]), "--name=study"]
    study = load_study("embedded", [*small, FEW], "study")
    pipeline.check(study)
    plan = pipeline.Plan(study)
    written = json.loads(workflow.write(plan, arguments).read_text())
    assert written["called_in"] == str(Path.cwd())  # from which the paths in the arguments count
    made = {row["name"]: row for row in written["jobs"]}
    named = [shlex.split(row["command"])[5] for row in made.values()]
    assert named == [stage.name for stage in plan.stages]
    marks = house / "study" / "workflow" / "marks"
    assert [path.name for path in marks.iterdir()] == [next(iter(made.values()))["mark"].rpartition("/")[2]]  # the text
    of_mark = {row["mark"]: name for name, row in made.items()}
    behind = {name: {of_mark[mark] for mark in row["after"]} for name, row in made.items()}
    trainings = {name for name in made if "ensembles" in name}
    matching = next(name for name in made if name.endswith("_matching"))
    assert len(trainings) == 2
    assert trainings < behind[matching]
    # What nobody asks for any more, and what was marked and is not there, is no reason to leave a job out.
    (marks / "999_gone-abc").touch()
    (marks / made[matching]["mark"].rpartition("/")[2]).touch()
    workflow.write(plan, arguments)
    assert len(list(marks.iterdir())) == 1

    def marks_with(override: str) -> set[str]:
        path = workflow.write(pipeline.Plan(load_study("embedded", [*small, FEW, override], "study")), arguments)
        return {row["mark"] for row in json.loads(path.read_text())["jobs"]}

    of_trainings = {made[name]["mark"] for name in trainings}
    assert of_trainings < marks_with("threshold=0.5")
    assert made[matching]["mark"] not in marks_with("threshold=0.5")
    assert not of_trainings & marks_with("rate=0.001")


def test_parts_of_a_training_share_its_seeds_out(small, house):
    study = load_study("embedded", [*small, FEW], "study")
    pipeline.check(study)
    stage = next(stage for stage in pipeline.Plan(study).stages if "ensembles" in stage.name)
    for parts in range(1, 5):
        shares = [list(pipeline.part_of(stage, number, parts).entries) for number in range(1, parts + 1)]
        assert sorted(entry for share in shares for entry in share) == sorted(stage.entries)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--part", "3/2"), "--part 3/2"),
        (("--part", "0/1"), "--part 0/1"),
        (("--part", "half"), "give one such as 1/4"),
        (("--part", "1/2"), "can be cut into 1 at most"),
    ],
)
def test_a_part_that_there_is_not_is_said(call, small_options, house, options, named):
    status, _, error = call("stage", "embedded", "tables", *small_options, "--name", "other", *options)
    assert (status, len(error)) == (2, 1)
    assert named in error[0]


def test_what_jobs_need_is_said_in_one_line(call, small_options, house, monkeypatch, tmp_path):
    few = [*small_options, f"--set={FEW}", "--name", "study"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(workflow.sys, "executable", str(tmp_path / "python"))  # nothing lies beside it
    status, _, error = call("run", "embedded", *few, "--jobs", "2")
    assert (status, len(error)) == (2, 1)
    assert "pip install 'snakemake>=9'" in error[0]
    monkeypatch.setenv("SAE_STABILITY_SNAKEMAKE", "/bin/false")
    status, _, error = call("run", "embedded", *few, "--profile", "slurn")
    assert (status, len(error)) == (2, 1)
    assert "there are local, one-node, slurm" in error[0]
    status, _, error = call("run", "embedded", *few, "--jobs", "2")
    assert (status, len(error)) == (2, 1)
    assert "snakemake ended with status 1" in error[0]


def test_the_last_words_of_a_job_that_failed_are_told(call, small_options, house, monkeypatch, tmp_path):
    program = tmp_path / "snakemake"
    program.write_text(
        "#!/bin/sh\nfor argument; do case $argument in plan=*) plan=${argument#plan=};; esac; done\n"
        "logs=${plan%plan.json}logs; mkdir -p $logs; printf 'much\\nsae-stability: rate: too high\\n' > $logs/$JOB.log; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("SAE_STABILITY_SNAKEMAKE", str(program))
    study = load_study("embedded", [option.removeprefix("--set=") for option in small_options] + [FEW], "study")
    pipeline.check(study)
    failed = next(job for job in workflow.jobs(pipeline.Plan(study)) if "ensembles" in job.name)
    monkeypatch.setenv("JOB", failed.name)
    status, _, error = call("run", "embedded", *small_options, f"--set={FEW}", "--name", "study", "--jobs", "2")
    assert (status, len(error)) == (2, 1)
    assert f"{failed.stage.name}: rate: too high" in error[0]


GROWING = ("tokens", "seeds", "d_in", "d_sae", "k")


@given(
    kind=st.sampled_from(["activations", "null source", "training", "matching", "function", "quality", "subspaces"]),
    grown=st.sampled_from(GROWING),
    times=st.integers(2, 50),
)
def test_more_of_anything_never_costs_less(kind, grown, times):
    more = replace(SIZE, **{grown: times * getattr(SIZE, grown)})
    assert costs.work(kind, more) >= costs.work(kind, SIZE)
    assert costs.memory_gb(kind, more) >= costs.memory_gb(kind, SIZE)


def test_subspaces_hold_the_products_of_all_features_up_to_a_bound():
    def held(d_sae: int) -> float:
        """Beyond what a stage that holds none does, in bytes of a seed."""
        size = replace(SIZE, d_sae=d_sae)
        return 1e9 * (costs.memory_gb("subspaces", size) - costs.memory_gb("quality", size)) / (2 * SIZE.seeds)

    assert held(1024) == pytest.approx(8 * 1024**2 * 8, rel=1e-4)  # eight parts of the documents, in double precision
    assert held(100_000) == pytest.approx(1 << 27, rel=1e-4)


def test_training_costs_what_its_products_do():
    assert costs.work("training", SIZE) == 4 * 4000 * 32 * (48 + 6 * 4)
    twice = replace(SIZE, seeds=8, tokens=8000)
    assert costs.work("training", twice) == 4 * costs.work("training", SIZE)


def test_stages_of_a_size_take_the_median_of_their_rates():
    jobs = pd.DataFrame({"kind": ["training"] * 3 + ["matching"], "work": [1e9, 4e9, 9e9, 5e9], "seconds": [1.0, 2.0, 3.0, 1.0]})
    laws = costs.fitted(jobs)
    assert {kind: law.fixed for kind, law in laws.items()} == {"training": 0, "matching": 0}
    assert laws["training"].seconds(6e9) == pytest.approx(3)
    assert laws["matching"].seconds(1e10) == pytest.approx(2)
    seconds = costs.seconds("training", SIZE, laws) - costs.START_SECONDS
    assert seconds == pytest.approx(costs.work("training", SIZE) / 2e9)
    assert costs.seconds("tables", None, laws) == costs.START_SECONDS
    # A kind that was not measured takes as long as any, and where none was, a second for a thousand million.
    assert costs.seconds("function", SIZE, laws) - costs.START_SECONDS == pytest.approx(costs.work("function", SIZE) / 2e9)
    assert costs.seconds("function", SIZE, {}) - costs.START_SECONDS == pytest.approx(costs.work("function", SIZE) / 1e9)
    # Each from the two others: their rates are 2 and 3, 1 and 3, 1 and 2, of which medians by logarithms are taken.
    ratio = costs.error(jobs)["ratio"].to_numpy()
    np.testing.assert_allclose(ratio[:3], [1 / 6**0.5, 2 / 3**0.5, 3 / 2**0.5])
    assert np.isnan(ratio[3])


def test_stages_of_several_sizes_take_a_fixed_part_and_grow_with_their_work():
    jobs = pd.DataFrame({"kind": "training", "work": [1e9, 1e10, 1e11, 1e12]})
    jobs["seconds"] = 7 + 2e-10 * jobs["work"]
    law = costs.fitted(jobs)["training"]
    assert (law.fixed, law.per_work) == (pytest.approx(7), pytest.approx(2e-10))
    assert law.seconds(1e14) == pytest.approx(2e4, rel=1e-3)  # what is large is foretold at the rate of what is large
    np.testing.assert_allclose(costs.error(jobs)["ratio"], 1)
    steep = costs.fitted(jobs.assign(seconds=1e-13 * jobs["work"] ** 1.4))["training"]
    assert steep.fixed == 0  # and never less than nothing
    flat = costs.fitted(jobs.assign(seconds=[9.0, 8.0, 8.0, 8.0]))["training"]
    assert flat == costs.Law(pytest.approx(8e-12))
    assert costs.fitted(jobs.assign(work=[1.0, 2.0, 4.0, 9.9], seconds=[1.0, 2.0, 4.0, 9.9]))["training"].fixed == 0


def test_pools_cost_what_is_trained_for_them():
    """Of 96 seeds in pools of eight: fine-tuning of five products, and for six groups as much again thrice, but for one seed."""

    def of(*changes: str) -> float:
        study = load_study("pools-of-8", list(changes))
        return costs._trained(study, study.main)

    assert of("pool_controls=false") == pytest.approx(5 * 12 * 0.1)
    assert of() == pytest.approx(5 * 12 * 0.1 + 6 * (8 + 8.1 + 7))
    assert of("pool_size=32", "surrogate_seeds=32") == pytest.approx(5 * 3 * 0.1 + 3 * (32 + 32.1 + 31))
    trained = replace(SIZE, trained=2.5)
    more = costs.work("pooling", trained) - costs.work("pooling", SIZE)
    assert more == pytest.approx(2.5 * costs.work("training", SIZE) / SIZE.seeds)


def test_costs_elsewhere_are_those_of_the_stages_and_their_sum():
    laws = {"training": costs.Law(5e-10), "matching": costs.Law(2e-10)}
    found = costs.elsewhere({"small": SIZE, "large": replace(SIZE, d_sae=96)}, ["training", "matching"], laws).set_index(
        ["name", "kind"]
    )
    assert found.loc[("small", "training"), "hours"] == costs.seconds("training", SIZE, laws) / 3600
    for name in ("small", "large"):
        parts = found.loc[[(name, "training"), (name, "matching")]]
        assert found.loc[(name, "all"), "hours"] == pytest.approx(parts["hours"].sum())
        assert found.loc[(name, "all"), "memory_gb"] == parts["memory_gb"].max()


def test_how_far_estimates_lie_is_told_by_kind():
    jobs = pd.DataFrame(
        {"stage": list("abcd"), "kind": ["training"] * 3 + ["matching"], "work": 1e9, "seconds": [1.0, 2.0, 4.0, 9.0]}
    )
    found = costs.by_kind(costs.error(jobs)).set_index("kind")
    assert list(found.index) == ["matching", "training"]
    assert found.loc["training", ["jobs", "seconds", "rate"]].tolist() == [3, 2.0, 5e8]
    # 1 s foretold from 2 and 4 by the median of their logarithms, and so on: factors of 8**0.5, 1 and 8**0.5.
    assert found.loc["training", "error"] == pytest.approx(8**0.5)
    assert found["fixed"].tolist() == [0, 0]
    assert np.isnan(found.loc["matching", "error"])


def test_the_picture_of_stages_has_each_kind_and_no_arrow_that_follows_from_others(small, house):
    reads = costs.graph(pipeline.Plan(load_study("embedded", small, "study")))
    assert reads["text"] == set()
    assert reads["activations"] == {"text"}
    assert {"impacts", "matching", "training"} < reads["function"]
    assert not {"report", "tables", "claims.json"} & set(reads)
    (axis,) = stages({"text": set(), "training": {"text"}, "matching": {"training", "text"}}, "title").axes
    arrows = [text for text in axis.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in axis.texts if text not in arrows) == ["matching", "text", "training"]
    assert len(arrows) == 2
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts if text not in arrows}
    assert heights["text"] > heights["training"] > heights["matching"]
