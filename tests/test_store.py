import json
import os
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae_stability import files, places, pruning
from sae_stability import store as module
from sae_stability.errors import UserError
from sae_stability.experiments import ensembles
from sae_stability.files import locked, read_json, read_metadata, replacing, save_tensors, write_json, write_table
from sae_stability.loading import load_study, read_study
from sae_stability.store import SCRATCH, Store


@pytest.fixture
def store(house, monkeypatch) -> Store:
    monkeypatch.setattr(module, "git_commit", lambda: "a commit")
    return Store(load_study("quick"))


def compute(store: Store, entry: str = "stage", key: str = "key", value: object = 1) -> Path:
    """Compute an entry with one result."""
    with store.computing(entry, {entry: key}) as work:
        write_json(work.folder / "result.json", value)
    return work.folder


def test_a_finished_entry_is_done_for_its_key_only(store):
    compute(store)
    assert store.is_done("stage", "key")
    assert not store.is_done("stage", "another")
    provenance = store.provenance("stage")
    assert provenance["study_sha256"] == store.study.sha256
    assert provenance["commit"] == "a commit"
    assert list(provenance["files"]) == ["result.json"]


def test_several_entries_are_recorded_together_and_share_the_seconds(store):
    entries = {"shared/ensembles/x/0": "key", "shared/ensembles/x/1": "key"}
    with store.computing("shared/ensembles/x", entries) as work:
        work.scratch.mkdir(parents=True)
        (work.scratch / "checkpoint").write_text("half")
        for folder in work.folders.values():
            write_json(folder / "result.json", folder.name)
    assert [store.is_done(entry, "key") for entry in entries] == [True, True]
    assert [read_json(store.path(entry) / "result.json") for entry in entries] == ["0", "1"]
    assert not work.scratch.exists()
    assert store.path("shared/ensembles/x/0").parents[2].name == "_shared"


def test_what_is_in_scratch_outlives_a_kill_for_the_same_work_only(store):
    with pytest.raises(KeyboardInterrupt), store.computing("shared/x", {"shared/x/0": "key"}) as work:
        work.scratch.mkdir(parents=True)
        (work.scratch / "checkpoint").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), store.computing("shared/x", {"shared/x/1": "key"}) as other:
        raise KeyboardInterrupt
    assert not other.scratch.exists()
    with store.computing("shared/x", {"shared/x/0": "key"}) as again:
        assert (again.scratch / "checkpoint").read_text() == "half"


def test_what_an_entry_keeps_for_a_resumption_is_no_result_of_it(store):
    entry = {"stage": "key"}
    with pytest.raises(KeyboardInterrupt), store.computing("stage", entry) as work:
        write_json(work.folder / SCRATCH / "part" / "half.json", 1)
        raise KeyboardInterrupt
    with store.computing("stage", entry) as work:
        write_json(work.folder / "result.json", read_json(work.folder / SCRATCH / "part" / "half.json"))
    assert list(store.provenance("stage")["files"]) == ["result.json"]
    assert sorted(file.name for file in store.path("stage").iterdir()) == ["provenance.json", "result.json"]


def test_a_stage_killed_while_its_provenance_is_written_keeps_its_files(store, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            compute(store)
    with store.computing("stage", {"stage": "key"}) as work:
        assert (work.folder / "result.json").exists()
    assert list(store.provenance("stage")["files"]) == ["result.json"]
    assert not (work.folder / "begun.json").exists()


def test_an_interrupted_stage_is_not_done_and_keeps_what_it_has(store):
    with pytest.raises(KeyboardInterrupt), store.computing("stage", {"stage": "key"}) as work:
        write_json(work.folder / "half.json", 1)
        raise KeyboardInterrupt
    assert not store.is_done("stage", "key")
    killed = store.folder / "stage" / f"{files.TEMPORARY}killed.json-x"  # a SIGKILL in the middle of a write
    killed.mkdir()
    (killed / "killed.json").write_text("[")
    with store.computing("stage", {"stage": "key"}) as work:
        assert (work.folder / "half.json").exists()
    assert list(store.provenance("stage")["files"]) == ["half.json"]


def test_what_was_begun_with_another_key_is_dropped(store):
    with pytest.raises(KeyboardInterrupt), store.computing("stage", {"stage": "old"}) as work:
        write_json(work.folder / "half.json", 1)
        raise KeyboardInterrupt
    with store.computing("stage", {"stage": "new"}) as work:
        assert not (work.folder / "half.json").exists()


def test_files_are_computed_side_by_side_and_each_drops_what_a_kill_left_of_it(store):
    folder = store.folder / "chapters"
    folder.mkdir(parents=True)
    leftovers = [folder / f"{files.TEMPORARY}{name}" for name in ("one.json-killed", "one.provenance.json-killed")]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / ".left-by-a-library").write_text("[")
    with store.computing_file("chapters/other.json", "key") as other:
        other.write_text("2")
        with store.computing_file("chapters/one.json", "key") as one:
            one.write_text("1")
        assert not any(leftover.exists() for leftover in leftovers)
    assert {path.name: path.read_text() for path in (folder / "one.json", folder / "other.json")} == {
        "one.json": "1",
        "other.json": "2",
    }
    assert not list(folder.glob(f"{files.TEMPORARY}*"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_result_is_not_done_and_an_altered_one_is_named(store, damage, capfd):
    path = compute(store, value=list(range(100))) / "result.json"
    assert store.is_done("stage", "key")
    if damage == "truncate":
        path.write_text("[")
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[50] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    assert not store.is_done("stage", "key")
    assert (str(path) in capfd.readouterr().err) == (damage != "remove")
    compute(store, value=list(range(100)))
    assert store.is_done("stage", "key")


def test_damaged_provenance_counts_as_none(store):
    folder = compute(store)
    (folder / "provenance.json").write_text("{")
    assert not store.is_done("stage", "key")
    assert store.provenance("stage") is None


def test_a_file_stage_appears_whole_or_not_at_all(store):
    with pytest.raises(ZeroDivisionError), store.computing_file("claims.json", "key") as path:
        path.write_text("[")
        raise ZeroDivisionError
    assert not (store.folder / "claims.json").exists()
    with store.computing("claims.json", {"claims.json": "key"}) as work:
        work.folder.write_text("[]")
    assert store.is_done("claims.json", "key")
    assert store.claims() == []
    assert sorted(file.name for file in store.folder.iterdir()) == ["claims.json", "claims.provenance.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_library_leaves_beside_its_file_is_gone(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "value.safetensors") as temporary:
        temporary.with_name(".tmpSTPfGQ").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_tensors_and_tables_come_back_and_have_the_same_bytes_every_time(tmp_path):
    metadata = {"k": 3, "name": "x", "seeds": [1, 2], "scale": 0.1}
    for name in "ab":
        save_tensors(tmp_path / f"{name}.safetensors", {"w": torch.arange(6.0).view(2, 3).T}, metadata)
        write_table(tmp_path / f"{name}.parquet", pd.DataFrame({"x": [1, 2], "y": ["u", "v"]}))
    assert read_metadata(tmp_path / "a.safetensors") == metadata
    for kind in ("safetensors", "parquet"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_second_run_waits_for_the_first_and_readers_for_nobody(store, capsys):
    held, release = threading.Event(), threading.Event()

    def first():
        with store.locked(["stage"]):
            held.set()
            release.wait()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with store.locked(["another"]):  # only what is computed is locked
        pass
    assert not store.is_done("stage", "key")
    assert "waiting" not in capsys.readouterr().out
    threading.Timer(0.2, release.set).start()
    with store.locked(["stage"]):
        assert release.is_set()
    assert "waiting" in capsys.readouterr().out
    thread.join()


def test_cleaning_frees_what_no_plan_names_and_says_so_first(store, monkeypatch):
    stale, kept = compute(store, "shared/matching/old-1"), compute(store, "shared/matching/new-2")
    begun = store.path("shared/ensembles/x/.scratch/abc")
    begun.mkdir(parents=True)
    (begun / "checkpoint").write_text("half")
    monkeypatch.setattr(pruning, "_named", lambda study: {kept})
    said = list(pruning.clean(store.study, dry_run=True))
    assert stale.exists()
    assert len(said) == 3
    assert "would be freed" in said[-1]
    lines = pruning.clean(store.study)
    assert "old-1" in next(lines) + next(lines)
    assert stale.exists()  # it is said before it is done
    list(lines)
    assert not stale.exists()
    assert not begun.exists()
    assert kept.exists()


def test_what_is_begun_within_an_entry_goes_with_it(store, monkeypatch):
    half = store.path("shared/pooling/half-1")
    (half / ".scratch" / "abc").mkdir(parents=True)
    (half / ".scratch" / "abc" / "pool").write_bytes(bytes(1_000_000))
    write_json(half / "begun.json", {"key": "old"})
    stale = compute(store, "shared/quality/old-2")
    monkeypatch.setattr(pruning, "_named", lambda study: set())
    said = list(pruning.clean(store.study))
    assert "1.0 MB  in all, freed" in said[-1]
    assert not half.exists()
    assert not stale.exists()


def test_nothing_is_freed_while_what_a_study_needs_is_not_known(house, store, tmp_path):
    """A text on a disk that is away, say: whatever was trained on it would count as trained for nobody."""
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo", encoding="utf-8")
    study = load_study("quick", [f"corpus={text}"], name="mine")
    other = Store(study)
    other.write_study()
    entry, key = ensembles.entries(study, study.main, "real").popitem()
    trained = compute(other, entry, key)
    assert trained not in {house / line.split()[-1] for line in pruning.clean(store.study, dry_run=True)}
    text.unlink()
    with pytest.raises(UserError, match=r"mine/study\.json: corpus: there is no .*text\.txt.*nothing is freed"):
        list(pruning.clean(store.study))
    (other.folder / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine/study\.json: .*nothing is freed"):
        list(pruning.clean(store.study))
    assert trained.exists()
    (other.folder / "study.json").unlink()
    assert any(str(trained.relative_to(house)) in line for line in pruning.clean(store.study, dry_run=True))


def test_a_part_of_another_study_of_the_same_name_takes_its_place_only_where_there_is_none(store):
    few = Store(load_study("quick", ["seeds=3"]))
    few.write_study(anew=False)
    assert read_study(few.folder / "study.json") == few.study
    store.write_study()
    few.write_study(anew=False)
    assert read_study(store.folder / "study.json") == store.study


def test_what_another_run_takes_away_while_cleaning_looks_is_passed_over(store, monkeypatch):
    stale = compute(store, "shared/matching/old-1")
    (stale / f"{files.TEMPORARY}result.json-x").mkdir()
    monkeypatch.setattr(pruning, "_named", lambda study: set())
    scan = os.scandir

    def after_it_went(path):
        if Path(path).name.startswith(files.TEMPORARY):
            os.rmdir(path)
        return scan(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", after_it_went)
        assert "old-1" in next(pruning.clean(store.study, dry_run=True))
    assert files.below(places.results(), "*.json", "old-*") == [stale, *sorted(stale.glob("*.json"))]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    import subprocess
    import sys

    lines = ["import os", "from pathlib import Path", "from sae_stability.files import locked"]
    held = "\n".join([*lines, f"with locked(Path({str(tmp_path)!r}) / 'l', Path('x')): os._exit(9)"])
    subprocess.run([sys.executable, "-c", held], check=False, env=os.environ)
    with locked(tmp_path / "l", tmp_path):
        pass
