import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from helpers import drawn
from sae_stability import cli, places
from sae_stability.errors import UserError
from sae_stability.loading import load_study


@pytest.mark.parametrize(
    ("override", "named", "mend"),
    [
        ("thresold=0.7", "thresold", "did you mean threshold"),
        ("threshold=1.5", "threshold", "less than or equal to 1"),
        ("threshold=0", "threshold", "greater than 0"),
        ("d_sae=many", "d_sae", "valid integer"),
        ("k=2000", "k", "lower k or raise d_sae"),
        ("seeds=1", "seeds", "two or more"),
        ("seeds=[-1,0]", "seeds", "count from 0"),
        ("batch=5_000_000", "batch", "lower batch or raise tokens"),
        ("rate=.inf", "rate", "finite"),
        ("seeds=[3,3]", "seeds", "give each once"),
        ("tokens=-1", "tokens", "greater than 0"),
        ("hook_name=blocks.1.hook_resid_mid", "hook_name", "hook_resid_post"),
        ("variant=topq", "variant", "'topk'"),
        ("grid.d_sea=[8]", "grid", "did you mean d_sae"),
        ("grid.k=[8,4096]", "grid", "lower k or raise d_sae"),
        ("grid.k=[]", "grid", "drop the key"),
        ("model.x=1", "model.x", "no keys inside"),
        ("nonsense", "nonsense", "key=value"),
    ],
)
def test_a_typo_in_a_study_gives_one_line_and_status_2(call, override, named, mend):
    status, _, error = call("check", "embedded", "--set", override)
    assert status == 2
    assert len(error) == 1
    assert named in error[0]
    assert mend in error[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "embeded"), "did you mean embedded"),
        (("run", "no/such.yaml"), "no/such.yaml"),
        (("run", "quick", "--sett", "k=2"), "--sett"),
        (("run",), "'study'"),
        (("train-model", "docstrings-3l", "--out", "/tmp/none"), "docstrings-2l or docstrings-4l"),
        (("fly",), "fly"),
    ],
)
def test_a_wrong_command_gives_one_line_and_status_2(call, arguments, named):
    status, _, error = call(*arguments)
    assert status == 2
    assert len(error) == 1
    assert named in error[0]


@pytest.mark.parametrize(
    ("content", "named"),
    [("[1, 2", "YAML"), ("- just\n- a list", "key: value"), ("name: x\nmodel: y", "hook_name: missing")],
)
def test_an_unreadable_study_file_is_said(call, tmp_path, content, named):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    status, _, error = call("check", str(path))
    assert (status, len(error)) == (2, 1)
    assert named in error[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("hook_name=blocks.9.hook_resid_post", "hook_name: the model has no blocks.9.hook_resid_post"),
        ("tokens=5_000_000", "tokens:"),
        ("context=100", "context: the model reads 64"),
        ("model=/no/such/model", "model: there is no folder"),
        ("corpus=/no/such/text.txt", "corpus: there is no /no/such/text.txt"),
    ],
)
def test_what_only_model_and_corpus_can_tell_is_checked_before_anything_is_computed(call, small_options, override, named, house):
    status, _, error = call("run", "embedded", *small_options, "--set", override, "--name", "other")
    assert (status, len(error)) == (2, 1)
    assert named in error[0]
    assert not list(house.rglob("*.bin"))
    assert not list(house.rglob("ensemble.safetensors"))


@pytest.mark.parametrize(("special", "said"), [({}, "neither a BOS nor an EOS"), ({"eos_token": "<e>"}, "does not know")])
def test_a_tokenizer_that_loses_most_of_a_text_is_refused(
    special, said, call, small_options, model_folders, text_file, house, tmp_path
):
    # The bridge would take the unknown word's, and every unknown word would vanish from the text.
    folder = shutil.copytree(model_folders["gpt2"], tmp_path / "model")
    bare = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "<e>": 1, "array": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in folder.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", **special).save_pretrained(folder)
    status, _, error = call("check", "embedded", *small_options, f"--set=model={folder}", "--name", "other")
    assert (status, len(error)) == (2, 1)
    assert said in error[0]


def test_a_dry_run_lists_what_is_missing_and_computes_nothing(call, small_options, house):
    status, out, _ = call("run", "embedded", *small_options, "--name", "other", "--dry-run")
    assert status == 0
    *stages, total = out.splitlines()
    assert all(line.startswith("missing") for line in stages)
    assert any("-surrogate-" in line and "ensembles" in line for line in stages)
    # How large the model is, is not known yet, and so no total is told.
    assert f"of {len(stages)} stages can't be foretold before sae-stability check, with the same --set" in total
    assert "hours" not in total
    assert not house.exists()


def test_a_dry_run_knows_what_one_process_takes_once_the_text_is_read(call, small_options, house):
    status, out, error = call("check", "embedded", *small_options, "--set", "d_sae=24", "--set", "device=cuda", "--name", "other")
    assert status == 0
    assert "d_sae=24 k=4 tokens=" in out
    assert re.search(r": \d+ SAEs, \d+ of the surrogate null\n", out)
    assert any("24 features are fewer than the 32 dimensions" in line for line in error)
    if not torch.cuda.is_available():
        assert any("no GPU is seen on this machine" in line for line in error)
    status, out, _ = call("run", "embedded", *small_options, "--set", "d_sae=24", "--name", "other", "--dry-run")
    assert status == 0
    *stages, total = out.splitlines()
    minutes = sum(float(line.split()[1]) for line in stages if line.startswith("missing"))
    told = float(re.fullmatch(r"about ([\d,.]+) hours one after another in one process, as stages took elsewhere", total)[1])
    assert told == pytest.approx((minutes + 0.25) / 60, abs=0.06 + 0.05 * len(stages) / 60)


@pytest.mark.parametrize("profile", ["slrum", "slurm/nowhere", "."])
def test_a_dry_run_refuses_a_profile_that_is_none(call, small_options, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = call("run", "embedded", *small_options, "--name", "other", "--dry-run", "--profile", profile)
    assert (status, len(error)) == (2, 1)
    assert f"--profile {profile}: no such profile; there are local, one-node, slurm, or give a folder" in error[0]


def test_a_stage_alone_says_what_it_needs(call, small_options, house):
    status, _, error = call("stage", "embedded", "tables", *small_options, "--name", "other")
    assert (status, len(error)) == (2, 1)
    assert "/quality/report" in error[0]
    status, _, error = call("stage", "embedded", "tabels", *small_options, "--name", "other")
    assert (status, len(error)) == (2, 1)
    assert "has no tabels, did you mean tables?; `sae-stability run STUDY --dry-run`, with the same options, lists its" in error[0]


def test_what_may_not_be_written_is_said_in_one_line(call, small_options, monkeypatch, house):
    def refused(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    status, _, error = call("run", "embedded", *small_options, "--name", "other")
    assert (status, len(error)) == (2, 1)
    assert str(house) in error[0]
    assert "SAE_STABILITY_RESULTS" in error[0]


@pytest.mark.parametrize("command", ["run", "check", "stage", "clean", "stability", "pool", "explain", "train-model"])
def test_help_names_every_option_and_shows_how_to_call_it(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0
    for name in signature(getattr(cli, command.replace("-", "_"))).parameters:
        shown = {"study": "study", "stage": "NAME", "paths": "PATH", "sources": "PATH", "overrides": "--set"}.get(
            name, f"--{name.replace('_', '-')}"
        )
        assert shown in out or (command == "train-model" and name == "name")
    if command in ("run", "stage", "stability", "pool", "explain"):
        assert f"  sae-stability {command} " in out


def test_overrides_reach_the_grid_and_each_cell_has_an_id_and_a_name():
    study = load_study("embedded", ["grid={}", "grid.d_sae=[512, 1024]", "grid.k=[16, 32]", "seeds=[3, 5]"], name="wide")
    assert study.name == "wide"
    assert study.seed_list == [3, 5]
    assert [(cell.d_sae, cell.k) for cell in study.cells.values()] == [(1024, 16), (512, 16), (512, 32), (1024, 32)]
    assert list(study.cells) == [cell.id for cell in study.cells.values()]
    assert list(study.names.values()) == ["d_sae=1024, k=16", "d_sae=512, k=16", "d_sae=512, k=32", "d_sae=1024, k=32"]


def test_alone_it_prints_its_help_as_lines_and_its_version(call):
    status, out, error = call()
    assert (status, error) == (0, [])
    assert "  stability " in out
    assert len(out.splitlines()) > 10
    status, out, _ = call("--version")
    assert status == 0
    assert re.fullmatch(r"sae-stability \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_name_is_no_reason_to_fail(tmp_path, encoding):
    for seed in range(2):
        save_file({"W_dec": drawn(30, 8, seed=seed)}, tmp_path / f"sä{seed}.safetensors")
    command = [sys.executable, "-c", "from sae_stability.cli import main; main()", "stability", "--out", "zeilen-😀.csv"]
    names = sorted(path.name for path in tmp_path.iterdir())
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, *names], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rows             60 features in zeilen-" in done.stdout
    assert (tmp_path / "zeilen-😀.csv").is_file()


def test_whatever_the_system_refuses_is_one_line_with_its_file(call, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(tmp_path / "x"))

    monkeypatch.setattr("sae_stability.existing.compare", refuse)
    status, _, error = call("stability", "a", "b", "--out", tmp_path / "rows.csv")
    assert (status, len(error)) == (1, 1)
    assert f"{tmp_path / 'x'}: Transport endpoint is not connected" in error[0]


def test_our_warnings_are_one_line_and_those_of_libraries_stay_away(call, monkeypatch, tmp_path):
    def warn(*_, **__):
        warnings.warn_explicit("text\nof two lines", UserWarning, cli.__file__, 7)
        warnings.warn_explicit("something internal", FutureWarning, "/usr/lib/other.py", 7)
        raise UserError("that is all")

    monkeypatch.setattr("sae_stability.existing.compare", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        _, _, error = call("stability", "a", "b", "--out", tmp_path / "x.csv")
    assert error == ["sae-stability: text of two lines", "sae-stability: that is all"]


def test_outside_of_a_checkout_it_says_so_before_anything_is_computed(call, tmp_path, monkeypatch):
    study = tmp_path / "study.yaml"
    study.write_text((places.root() / "studies" / "quick.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(places, "root", lambda: tmp_path)
    for arguments in (("run", "quick"), ("check", "quick")):
        status, _, error = call(*arguments)
        assert (status, len(error)) == (2, 1)
        assert "call it from a checkout" in error[0]
    status, _, error = call("run", study)
    assert (status, len(error)) == (2, 1)
    assert "there are no chapters" in error[0]


def test_a_name_that_is_too_long_is_a_mistake(call, tmp_path):
    status, _, error = call("stability", "one", "other", "--out", f"{'a' * 300}.csv")
    assert (status, len(error)) == (2, 1)
    assert error[0].endswith("the name is too long; choose a shorter one")


@pytest.mark.parametrize(
    ("arguments", "helps"),
    [
        (("pool", "quick"), "sae-stability pool --help"),
        (("run", "--nope"), "sae-stability run --help"),
        (("frob",), "sae-stability --help"),
    ],
)
def test_what_is_misused_names_its_own_help(call, arguments, helps):
    status, _, error = call(*arguments)
    assert (status, len(error)) == (2, 1)
    assert error[0].endswith(f"; {helps} lists what there is")
