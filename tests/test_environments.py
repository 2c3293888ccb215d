"""What the environments of users do to a run: masks, mounts, locks, folders that can't be written, other repositories."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import drawn
from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.existing import compare
from sae_stability.files import locked, save_arrays, write_json
from sae_stability.matching import stability
from sae_stability.saes import formats
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE
from sae_stability.study import Recipe
from sae_stability.training import train


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_what_is_written_follows_the_user_s_mask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "x.json", {})
        save_arrays(tmp_path / "x.safetensors", {"x": np.zeros(2)})
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("x.json", "x.safetensors")} == {mode}


def test_a_mount_without_modes_is_written_to(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").is_file()


def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", tmp_path):
        pass
    assert "has no locks; run one study at a time" in capsys.readouterr().err


def test_a_copy_inside_another_repository_is_of_no_commit(tmp_path):
    outer = tmp_path / "outer"
    (outer / "inner" / "studies").mkdir(parents=True)
    git = ["git", "-c", "user.email=a@b", "-c", "user.name=a"]
    subprocess.run(["git", "init", "-q"], cwd=outer, check=True)
    (outer / "x").write_text("x")
    subprocess.run(["git", "add", "x"], cwd=outer, check=True)
    subprocess.run([*git, "commit", "-qm", "outer"], cwd=outer, check=True)
    told = {}
    for root in (outer / "inner", places.root()):
        environment = os.environ | {"SAE_STABILITY_ROOT": str(root)}
        command = [sys.executable, "-c", "from sae_stability.store import git_commit; print(git_commit())"]
        told[root] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert told[outer / "inner"] == "unknown"


@pytest.mark.parametrize("writable", [True, False])
def test_kernels_are_kept_in_a_folder_of_the_user_s_own_where_nothing_else_may_be_written(writable):
    code = f"import os; os.access = lambda *_: {writable}; import sae_stability; print(os.environ.get('NUMBA_CACHE_DIR'))"
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f"-kernels-{os.getuid()}") != writable


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can be nobody")
def test_a_user_without_a_home_runs_a_checkout_that_can_not_be_written(tmp_path):
    for seed in range(2):
        W = drawn(30, 8, seed=seed)
        formats.save(SAE("relu", None, Parameters(W, torch.zeros(30), W, torch.zeros(8))), tmp_path / f"sae{seed}")
    shutil.copytree(places.root() / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "studies").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "PYTHONPATH": f"{tmp_path / 'src'}:{packages}",
        "SAE_STABILITY_ROOT": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(tmp_path / "out"),
    }
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    if subprocess.run([*nobody, "-c", "import torch"], env=environment, capture_output=True).returncode:
        pytest.skip("this interpreter is not for others")
    code = "from sae_stability.cli import main; main()"
    command = [*nobody, "-c", code, "stability", "sae0", "sae1", "--out", str(tmp_path / "out" / "r.csv")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "r.csv").is_file()


# What Python gives


W = torch.stack([drawn(40, 12, seed=seed) for seed in range(3)])


@pytest.mark.parametrize(
    "given",
    [
        list(W),
        [of_one.numpy() for of_one in W],
        W.numpy().astype(np.float64),
        np.asfortranarray(W.numpy()),
        np.ascontiguousarray(W.numpy()[::-1])[::-1],
        W.clone().requires_grad_(),
    ],
)
def test_decoders_are_taken_from_anywhere(given):
    assert torch.equal(stability(given).counts, stability(W).counts)


def test_decoders_of_several_shapes_are_said():
    with pytest.raises(UserError, match=r"decoders of several shapes \(\[40, 12\], \[30, 12\]"):
        stability([W[0], W[1][:30]])


def test_paths_may_come_one_by_one_and_one_alone_is_said(tmp_path):
    for seed, directions in enumerate(W):
        formats.save(SAE("relu", None, Parameters(directions, torch.zeros(40), directions, torch.zeros(12))), tmp_path / f"{seed}")
    assert len(compare(tmp_path / f"{seed}" for seed in range(3)).saes) == 3
    with pytest.raises(UserError, match="one path; give a list"):
        compare("sae0 sae1")


def test_links_are_called_by_their_own_names(tmp_path):
    paths = []
    for seed, directions in enumerate(W):
        formats.save(
            SAE("relu", None, Parameters(directions, torch.zeros(40), directions, torch.zeros(12))), tmp_path / f"9f86d0{seed}"
        )
        (tmp_path / f"seed{seed}").symlink_to(tmp_path / f"9f86d0{seed}")
        paths.append(tmp_path / f"seed{seed}")
    assert compare(paths).names == ["seed0", "seed1", "seed2"]


RECIPE = Recipe(model="none", hook_name="blocks.0.hook_resid_post", d_sae=32, k=4, tokens=3000, batch=250, encoder="float32")
X = drawn(3000, 16)


@pytest.mark.parametrize(
    "given", [X.numpy(), X.double(), X.clone().requires_grad_(), X.T.contiguous().T, np.asfortranarray(X.numpy())]
)
def test_activations_are_taken_from_anywhere(given):
    assert torch.equal(train(RECIPE, given, seeds=range(2)).W_dec, train(RECIPE, X, seeds=range(2)).W_dec)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (X.view(30, 100, 16), r"their shape is \[30, 100, 16\]"),
        (X.clone().index_fill_(0, torch.tensor([5]), torch.nan), "hold NaN or infinite"),
        (torch.ones(3000, 16), "all tokens are the same"),
    ],
)
def test_what_nothing_can_be_trained_on_is_said(given, said):
    with pytest.raises(UserError, match=said):
        train(RECIPE, given, seeds=range(2))


def test_what_is_set_for_other_programs_on_numba_stays_out_of_kernels():
    script = (
        "import torch; from sae_stability.methods.pursuit import matching_pursuit;"
        "print(float(matching_pursuit(torch.eye(3), torch.eye(3), 1, torch.zeros(1, 3) > 0)[0][1].sum()))"
    )
    others = {"NUMBA_DISABLE_JIT": "1", "NUMBA_THREADING_LAYER": "tbb", "NUMBA_NUM_THREADS": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | others, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3.0"), done.stderr


def test_places_that_are_no_folders_are_named(call, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for name in ("SAE_STABILITY_ROOT", "SAE_STABILITY_RESULTS"):
        with monkeypatch.context() as patched:
            patched.setenv(name, str(file))
            status, _, error = call("check", "quick")
        assert (status, len(error)) == (2, 1)
        assert name in error[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAE_STABILITY_RESULTS", "~/found")
    assert places.results() == tmp_path / "found"


def test_an_interpreter_without_docstrings_is_one_line():
    done = subprocess.run([sys.executable, "-OO", "-m", "sae_stability", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "PYTHONOPTIMIZE" in done.stderr


def test_a_working_directory_that_was_removed_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.rmdir({str(gone)!r}); from sae_stability.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=gone, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "working directory was removed" in done.stderr


def test_settings_of_tqdm_that_it_can_t_read_are_one_line():
    environment = os.environ | {"TQDM_MININTERVAL": "often"}
    command = [sys.executable, "-m", "sae_stability", "check", "quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "TQDM_MININTERVAL" in done.stderr


def test_help_waits_for_no_library_that_computes():
    script = "import sys, sae_stability.cli; print({'torch', 'pandas', 'numba', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()"
