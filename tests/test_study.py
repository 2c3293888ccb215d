"""Whole studies: other models and corpora, kills, what is shared, two at once, what is altered, and what the quick study holds."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sae_stability import pipeline
from sae_stability.book import build, page, tables
from sae_stability.errors import UserError
from sae_stability.experiments import texts
from sae_stability.files import below, write_json
from sae_stability.language import corpus
from sae_stability.ledger import CLAIMS
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan
from sae_stability.study import Cell

COMMAND = [sys.executable, "-c", "from sae_stability.cli import main; main()"]
COMPUTE = """
import sys
from sae_stability import pipeline
from sae_stability.ledger import CLAIMS
from sae_stability.loading import load_study
pipeline.compute(load_study("embedded", sys.argv[2:], name=sys.argv[1]))
"""


def read(results: Path, name: str) -> bytes:
    return (results / name / "claims.json").read_bytes()


@pytest.mark.parametrize(("architecture", "variant"), [("neox", "topk"), ("llama", "batchtopk")])
def test_other_architectures_reach_their_claims(house, small, model_folders, architecture, variant):
    overrides = [*small, f"model={model_folders[architecture]}", f"variant={variant}", "seeds=3", "threads=2"]
    study = load_study("embedded", overrides, name=architecture)
    store = pipeline.compute(study)
    assert list(dict.fromkeys(claim["id"] for claim in store.claims())) == list(CLAIMS)
    assert {claim["cell"] for claim in store.claims()} == {study.main.id}
    assert architecture in store.table("cells")["label"][0]
    assert store.table("saes")["loss_spliced"].gt(0).all()


def test_another_model_and_corpus_become_a_book_that_follows_the_study(house, small, tmp_path):
    other = tmp_path / "html"
    write_json(other / "provenance.json", {"key": "of another study"})
    (other / "removed.html").write_text("a page of that one, which must go", encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from sae_stability import pipeline; from sae_stability.book import build;"
        "from sae_stability.loading import load_study; study = load_study('embedded', sys.argv[3:], sys.argv[2]);"
        "pipeline.compute(study); build.execute(study); print(build.build(study, Path(sys.argv[1])))"
    )
    # What chapters must not take for granted: two seeds, one variant that is not TopK, a grid over widths.
    overrides = ["seeds=2", "variant=gated", "coefficient=1.0", "grid={d_sae: [32]}", "experiments=null"]
    arguments = [sys.executable, "-c", script, str(other), "other", *small, *overrides]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in other.glob("*.html")}
    assert {*build.chapters(), "search"} <= set(pages)
    assert "removed" not in pages
    for chapter, text in pages.items():
        shown = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.S)
        assert not re.search(r"\bnan\b", shown), chapter
    plain = {chapter: " ".join(re.sub(r"<[^>]*>", "", text).split()) for chapter, text in pages.items()}
    assert "trains 2 SAEs" in plain["index"]
    assert "A Gated SAE" in plain["setup"]
    assert (house / "other" / "chapters" / "stability.ipynb").exists()
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.stdout.splitlines() == [str(other / "index.html")]  # nothing was computed again


def test_a_few_long_documents_are_refused_until_enough_of_them_are_read(house, small, text_file, tmp_path):
    draw = random.Random(0)
    books = tmp_path / "books.txt"
    words = text_file.read_text(encoding="utf-8").split()[:60]
    books.write_text("\n\n".join(" ".join(draw.choices(words, k=3000)) for _ in range(40)), encoding="utf-8")
    overrides = [*small, f"corpus={books}", "seeds=2", "surrogate_seeds=2", "experiments=[function, explanations]"]
    with pytest.raises(UserError, match=r"evaluation_tokens.* give [\d,]+ or more") as refused:
        pipeline.check(load_study("embedded", overrides, "books"))
    enough = re.search(r"give ([\d,]+) or more", str(refused.value))[1].replace(",", "")
    with pytest.raises(UserError, match="evaluation_tokens"):
        pipeline.check(load_study("embedded", [*overrides, f"evaluation_tokens={int(enough) - 1}"], "books"))
    store = pipeline.compute(load_study("embedded", [*overrides, f"evaluation_tokens={enough}"], "books"))
    assert not store.table("removals").empty  # what was fitted again is judged on other documents


def test_of_a_dataset_as_much_is_read_as_fills_both_splits(small, monkeypatch):
    def load(name: str, characters: int):
        wanted.append(characters)
        raise UserError("that much")

    monkeypatch.setattr(texts.corpus, "load", load)
    wanted: list[int] = []
    for override in ("evaluation_tokens=20000", "tokens=90000"):
        cell = load_study("embedded", [*small, override]).main
        with pytest.raises(UserError, match="that much"):
            texts.read_text(cell, [cell.hook_name], None)
        held_out = corpus.EVALUATION_SHARE * wanted[-1] / corpus.CHARACTERS_A_TOKEN
        assert round(held_out) >= cell.evaluation_tokens
        assert round(wanted[-1] / corpus.CHARACTERS_A_TOKEN - held_out) >= cell.tokens


def compute(results: Path, name: str, overrides: list[str]) -> None:
    """Compute a study into results of its own, in a process that was forked."""
    os.environ["SAE_STABILITY_RESULTS"] = str(results)
    pipeline.compute(load_study("embedded", overrides, name=name))


def test_killed_at_any_moment_the_claims_are_those_of_an_undisturbed_run(tmp_path, small, request):
    context = multiprocessing.get_context("forkserver")
    # More passes than the other tests take, so that kills fall into training too; few experiments, since one store keeps all.
    overrides = [*small, "passes=8", "experiments=[function, triggers]"]

    def start(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=compute, args=(tmp_path / name, "study", overrides))
        process.start()
        return process

    def seconds_of(name: str) -> float:
        started, process = time.monotonic(), start(name)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - started

    seconds_of("first")  # compiles kernels
    seconds, generator, kills, rounds = seconds_of("calm"), random.Random(0), 0, 0
    while kills < request.config.getoption("--kills"):
        rounds += 1
        for share in sorted(generator.uniform(0, 0.9) for _ in range(3)):  # early ones first: the last one finds little to do
            process = start(f"killed-{rounds}")
            process.join(share * seconds)
            if process.is_alive():
                kills += 1
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        seconds_of(f"killed-{rounds}")
        assert read(tmp_path / "calm", "study") == read(tmp_path / f"killed-{rounds}", "study")
        shutil.rmtree(tmp_path / f"killed-{rounds}")
    assert read(tmp_path / "calm", "study") == read(tmp_path / "first", "study")


def trained(house: Path) -> dict[Path, int]:
    """When the files of trained SAEs were written."""
    return {path: path.stat().st_mtime_ns for path in house.rglob("ensemble.safetensors")}


def test_what_is_asked_trains_nothing_and_seeds_serve_every_study(house, small, monkeypatch):
    small = [*small, "experiments=[stability, function]"]
    few = load_study("embedded", [*small, "seeds=3", "grid={threshold: [0.5, 0.9]}"], name="few")
    store = pipeline.compute(few)
    before = trained(house)
    assert len(before) == 3 + 3  # the model's and the surrogate's
    stability = store.table("cells").set_index("threshold")["mean_stability"]
    assert stability[0.5] > stability[0.7] > stability[0.9]

    with monkeypatch.context() as patched:
        patched.setattr("sae_stability.training.train", lambda *_: pytest.fail("trained"))
        pipeline.compute(load_study("embedded", [*small, "seeds=3", "threshold=0.6"], name="asked"))
    assert trained(house) == before

    many = load_study("embedded", [*small, "seeds=5", "surrogate_seeds=3"], name="many")
    pipeline.compute(many)
    assert len(trained(house)) == 5 + 3
    assert {path: trained(house)[path] for path in before} == before
    alone = house.parent / "alone"
    monkeypatch.setenv("SAE_STABILITY_RESULTS", str(alone))
    pipeline.compute(many)
    assert read(alone, "many") == read(house, "many")  # in company or not


def test_a_kill_and_another_threshold_go_on(house, small):
    overrides = [*small, "passes=12"]
    process = subprocess.Popen([sys.executable, "-c", COMPUTE, "study", *overrides], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(path.parent.name == "shards" for path in below(house, "*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun = list(house.rglob(".scratch/*"))
    assert begun
    study = load_study("embedded", [*overrides, "threshold=0.5", "seeds=4"], name="study")
    plan = Plan(study)
    plan.compute(
        stage for stage in plan.stages if "/ensembles/" in stage.name or "/texts/" in stage.name or "activations" in stage.name
    )
    assert not list(house.rglob(".scratch"))
    assert len(trained(house)) == 8


def test_two_studies_at_once_share_what_they_have_in_common(house, small):
    commands = [[sys.executable, "-c", COMPUTE, f"study-{seeds}", *small, f"seeds={seeds}"] for seeds in (2, 3)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len(trained(house)) == 3 + 3
    for seeds in (2, 3):
        assert {line["id"] for line in json.loads(read(house, f"study-{seeds}"))} == set(CLAIMS)


def test_an_altered_result_is_named_and_computed_again_to_the_same_bytes(house, small, capfd):
    study = load_study("embedded", [*small, "seeds=2", "surrogate_seeds=2"], name="study")
    store = pipeline.compute(study)
    claims = read(house, "study")
    files = [path for path in sorted(house.rglob("*")) if path.is_file() and "_locks" not in path.parts and path.stat().st_size]
    kinds = {(path.name, path.parent.parent.name) for path in files}
    assert len(kinds) > 20
    for path in files[:: max(1, len(files) // 12)]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0b10
        path.write_bytes(content)
        capfd.readouterr()
        pipeline.compute(study)
        named = "provenance" in path.name or path.name == "study.json" or str(path) in capfd.readouterr().err
        assert named, path
        assert read(house, "study") == claims, path
    assert store.claims()


def test_a_grid_gives_a_row_for_each_cell_and_each_has_its_own_claims(house, small):
    sites = "grid.hook_name=[blocks.0.hook_resid_post, blocks.1.hook_mlp_out]"
    study = load_study("embedded", [*small, sites, "seeds=2", "surrogate_seeds=2"], name="grid")
    store = pipeline.compute(study)
    table = store.table("cells")
    assert table["cell"].tolist() == list(study.cells)
    assert table["hook_name"].tolist() == [cell.hook_name for cell in study.cells.values()]
    lines = store.claims()
    by_cell = {cell: [line for line in lines if line["cell"] == cell] for cell in study.cells}
    for row in table.itertuples():
        (c1,) = [line for line in by_cell[row.cell] if line["id"] == "C1" and line["line"] == "beyond size and noise"]
        assert c1["conditions"][0]["value"] == pytest.approx(row.mean_stability - row.surrogate_mean_stability, abs=1e-5)
    book = page.open_study("grid")
    assert book.claim("C2")["cell"] == study.main.id
    of_other = [line for line in by_cell[list(study.cells)[1]] if line["id"] == "C2"]
    assert book.claims("C2", list(study.cells)[1]) == tables.placed(of_other, "results/grid")


def test_one_stage_computes_nothing_else(house, small, small_options, call):
    study = load_study("embedded", small, name="embedded")
    plan = Plan(study)
    first, second, *_ = plan.stages
    for stage in (first, second):
        status, out, _ = call("stage", "embedded", stage.name, *small_options)
        text = [line for line in out.splitlines() if line.startswith("corpus: ")]  # of the stage that reads it
        assert (status, [line for line in out.splitlines() if line not in text]) == (0, [f"embedded: {stage.name}"])
        assert len(text) == (stage is first)
    assert [plan.is_done(stage) for stage in plan.stages[:3]] == [True, True, False]
    status, out, _ = call("stage", "embedded", first.name, *small_options)
    assert (status, out) == (0, "")


@pytest.mark.parametrize("null", ["randomised", "whitened", "token-conditional"])
def test_every_null_reaches_the_tables(house, small, null):
    study = load_study("embedded", [*small, "seeds=2", "surrogate_seeds=2", f"nulls=[surrogate, {null}]"], name="nulls")
    store = pipeline.compute(study)
    assert set(store.table("features")["kind"]) == {"real", "surrogate", null}
    (c1,) = [line for line in store.claims() if (line["id"], line["line"]) == ("C1", "as stated")]
    assert [each["null"] for each in c1["nulls"]] == ["surrogate", null]


def test_tokens_that_stand_far_out_are_left_out_everywhere(house, small):
    from sae_stability.experiments import texts

    study = load_study("embedded", [*small, "seeds=2", "surrogate_seeds=2", "norm_cutoff=1.05", "tokens=2000"], name="cut")
    pipeline.compute(study)
    results = Plan(study).results(study.main)
    for split in ("train", "evaluation"):
        activations, contexts = texts.activations(results, split), texts.contexts(results, split)
        assert contexts.is_text.sum() >= len(activations)
        norms = activations.data.float().norm(dim=1)
        assert norms.max() <= 1.05 * norms.median() * 1.5
    whole = load_study("embedded", [*small, "seeds=2", "surrogate_seeds=2", "tokens=2000"], name="whole")
    plan = Plan(whole)
    plan.compute(stage for stage in plan.stages if "texts" in stage.name or stage.name.startswith("activations"))
    uncut = texts.activations(plan.results(whole.main), "train").data.float().norm(dim=1)
    cut = texts.activations(results, "train").data.float().norm(dim=1)
    assert cut.max() < uncut.max()
    assert len(cut) == 2000


def test_the_quick_study_is_consistent(quick):
    features, saes = quick.table("features"), quick.table("saes")
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


def test_every_line_of_the_ledger_names_a_cell_and_each_cell_its_own_numbers(quick):
    cells = quick.table("cells", every_cell=True).set_index("cell")
    assert set(cells.index) == set(quick.study.cells)
    order = [(list(quick.study.cells).index(line["cell"]), list(CLAIMS).index(line["id"])) for line in quick.ledger]
    assert order == sorted(order)
    for line in quick.ledger:
        assert line["cell"] in quick.study.cells
    for cell in quick.study.cells:
        above = quick.claim("C1", cell, "beyond size and noise")
        row = cells.loc[cell]
        assert above["value"] == pytest.approx(row["mean_stability"] - row["surrogate_mean_stability"], abs=1e-6)
    assert {line["id"] for line in quick.ledger if line["cell"] == quick.cell.id} >= {
        "C1",
        "C2",
        "C3",
        "C4",
        "C5",
        "C6",
        "C7",
        "B5",
    }


def test_cells_are_compared_at_equal_l0_and_at_equal_quality(quick):
    cells = quick.table("cells", every_cell=True)
    assert set(cells["variant"]) == {"topk", "gated"}
    assert ((cells["l0"] - cells["k"]).abs() <= 0.05 * cells["k"]).eq(cells["l0_on_target"]).all()
    main, others = cells.iloc[0], cells.iloc[1:]
    assert main["l0_at_equal_quality"] == pytest.approx(main["l0"])  # the main cell sets the quality
    for _, other in others.dropna(subset="l0_at_equal_quality").iterrows():
        # Whoever explains more at its own L0 needs fewer features for the same.
        assert (other["explained_variance"] > main["explained_variance"]) == (other["l0_at_equal_quality"] < other["l0"])
    for name in ("features", "saes", "curve", "growth", "thresholds"):
        flagged = quick.table(name, every_cell=True).set_index("cell")["cell_on_target"]
        assert (flagged == flagged.index.map(cells.set_index("cell")["l0_on_target"])).all()
    assert (cells["coefficient"] > 0).eq(cells["variant"] == "gated").all()


def test_tables_read_anywhere(quick):
    for path in (quick.folder / "tables").glob("*.parquet"):
        # No token of this model stands far out, and the rules explain every feature.
        assert len(pd.read_parquet(path)) > 0 or path.stem in ("outliers", "not_explained")
    provenance = json.loads((quick.folder / "tables" / "provenance.json").read_text())
    assert {"key", "study_sha256", "versions", "commit", "device", "seconds", "peak_memory_gb", "files"} <= set(provenance)
    assert provenance["study"]["seeds"] == quick.study.seeds


def test_a_study_of_some_experiments_asks_those_and_what_they_read():
    names = {stage.name for stage in Plan(load_study("quick", ["experiments=[sharing]", "grid={}"])).stages}
    of_cells = {name.partition("/")[2] for name in names if name.startswith("topk-")}
    assert of_cells == {"quality", "quality/report", "matching", "sharing/report"}


def test_an_experiment_that_there_is_not_is_named_with_what_there_is():
    with pytest.raises(UserError, match=r"experiments: there is no sharin, did you mean sharing\?; there are"):
        list(Plan(load_study("quick", ["experiments=[sharin]"])).stages)


def test_the_id_of_a_cell_outlives_new_keys_of_the_schema():
    """Published tables are found by it. A key that stands at its default is no part of it, whether it is spelled out or not."""
    keys = {"model": "m", "hook_name": "blocks.0.hook_resid_post", "d_sae": 64, "k": 4, "tokens": 5000, "seeds": 3}
    assert Cell(**keys).id == Cell(**keys, threshold=0.7, batch=1024).id == "topk-64-48897c0a"
    assert Cell(**keys, threshold=0.8).id != Cell(**keys).id
