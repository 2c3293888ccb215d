import json
import threading

import pandas as pd
import pytest
import torch

from sae_stability import store as module
from sae_stability.config import load_study
from sae_stability.results import Source
from sae_stability.store import Store, fingerprint, key_of, locked, read_metadata, replacing, save_tensors, write_json, write_table


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "git_commit", lambda: "a commit")
    return Store(load_study("quick"))


def test_a_finished_stage_is_done_for_its_key_only(store):
    with store.computing("stage", "key") as folder:
        write_json(folder / "result.json", 1)
    assert store.is_done("stage", "key")
    assert not store.is_done("stage", "another")
    provenance = store.provenance("stage")
    assert provenance["study_sha256"] == store.study.sha256
    assert provenance["commit"] == "a commit"
    assert list(provenance["files"]) == ["result.json"]


def test_a_stage_killed_while_its_provenance_is_written_keeps_its_files(store, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_record", killed)
        with pytest.raises(KeyboardInterrupt), store.computing("stage", "key") as folder:
            write_json(folder / "result.json", 1)
    with store.computing("stage", "key") as folder:
        assert (folder / "result.json").exists()
    assert list(store.provenance("stage")["files"]) == ["result.json"]
    assert not (folder / "begun.json").exists()


def test_an_interrupted_stage_is_not_done_and_keeps_what_it_has(store):
    with pytest.raises(KeyboardInterrupt), store.computing("stage", "key") as folder:
        write_json(folder / "half.json", 1)
        raise KeyboardInterrupt
    assert not store.is_done("stage", "key")
    (store.folder / "stage" / f"{module.TEMPORARY}killed.json").write_text("[")  # a SIGKILL in the middle of a write
    with store.computing("stage", "key") as folder:
        assert (folder / "half.json").exists()
    assert list(store.provenance("stage")["files"]) == ["half.json"]


def test_what_was_begun_with_another_key_is_dropped(store):
    with pytest.raises(KeyboardInterrupt), store.computing("stage", "old") as folder:
        write_json(folder / "half.json", 1)
        raise KeyboardInterrupt
    with store.computing("stage", "new") as folder:
        assert not (folder / "half.json").exists()


def test_files_are_computed_side_by_side_and_each_drops_what_a_kill_left_of_it(store):
    folder = store.folder / "chapters"
    folder.mkdir(parents=True)
    leftovers = [folder / f"{module.TEMPORARY}{name}" for name in ("one.json-killed", "one.provenance.json-killed")]
    for leftover in leftovers:
        leftover.write_text("[")
    with store.computing_file("chapters/other.json", "key") as other:
        other.write_text("2")
        with store.computing_file("chapters/one.json", "key") as one:
            one.write_text("1")
        assert not any(leftover.exists() for leftover in leftovers)
    assert {path.name: path.read_text() for path in (folder / "one.json", folder / "other.json")} == {
        "one.json": "1",
        "other.json": "2",
    }
    assert not list(folder.glob(f"{module.TEMPORARY}*"))


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_result_is_not_done(store, damage):
    with store.computing("stage", "key") as folder:
        write_json(folder / "result.json", list(range(100)))
    if damage == "truncate":
        (folder / "result.json").write_text("[")
    else:
        (folder / "result.json").unlink()
    assert not store.is_done("stage", "key")


def test_a_file_stage_appears_whole_or_not_at_all(store):
    with pytest.raises(ZeroDivisionError), store.computing_file("claims.json", "key") as path:
        path.write_text("[")
        raise ZeroDivisionError
    assert not (store.folder / "claims.json").exists()
    with store.computing_file("claims.json", "key") as path:
        path.write_text("[]")
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


def test_tensors_and_tables_come_back_and_have_the_same_bytes_every_time(tmp_path):
    metadata = {"k": 3, "name": "x", "seeds": [1, 2], "scale": 0.1}
    for name in "ab":
        save_tensors(tmp_path / f"{name}.safetensors", {"w": torch.arange(6.0).view(2, 3).T}, metadata)
        write_table(tmp_path / f"{name}.parquet", pd.DataFrame({"x": [1, 2], "y": ["u", "v"]}))
    assert read_metadata(tmp_path / "a.safetensors") == metadata
    for kind in ("safetensors", "parquet"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_keys_follow_inputs_and_content(tmp_path):
    assert key_of({"a": 1}) == key_of({"a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": 1}) != key_of({"a": 1}, before=["x"])
    assert key_of({}, ["results.py"]) != key_of({}, ["claims.py"])
    (tmp_path / "f.txt").write_text("one")
    before = fingerprint(str(tmp_path))
    (tmp_path / "f.txt").write_text("two")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("a/hub-id") == "a/hub-id"


def test_a_second_run_waits_for_the_first(tmp_path, capsys):
    held = threading.Event()
    release = threading.Event()

    def first():
        with locked(tmp_path / ".lock"):
            held.set()
            release.wait()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    threading.Timer(0.2, release.set).start()
    with locked(tmp_path / ".lock"):
        assert release.is_set()
    assert "waiting" in capsys.readouterr().out
    thread.join()


def test_models_of_the_same_name_have_folders_of_their_own():
    sources = [Source(model, "docstrings", None, ("blocks.0.hook_resid_post",), 1, 1) for model in ("a/final", "b/final")]
    assert sources[0].folder != sources[1].folder
