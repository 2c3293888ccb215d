"""Where results live: atomic writes, checksums, provenance. Nothing half-written is ever read.

Results of a study stand in `results/STUDY/`, one folder or file a stage. A stage is done when the provenance beside it
holds the hash of everything that the result depends on: the study's fields, the stages before it, the source of the
modules that compute it and the versions of the libraries. Anything else is computed again.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_stability.config import ROOT, Study

COMPUTING = ("torch", "numpy", "numba", "scipy", "pandas", "pyarrow", "transformers", "transformer-lens", "tokenizers", "datasets")
DRAWING = ("matplotlib", "seaborn", "papermill", "jupyter-book")

PACKAGE = Path(__file__).parent
TEMPORARY = ".writing-"


@dataclass(frozen=True, eq=False)
class Store:
    """The results of one study."""

    study: Study

    @property
    def folder(self) -> Path:
        return ROOT / "results" / self.study.name

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage`, a folder or a file, was computed with `key` and is still there in full length."""
        provenance = self.provenance(stage)
        if provenance is None or provenance["key"] != key:
            return False
        folder = self._provenance_path(stage).parent
        files = ((folder / name, file["bytes"]) for name, file in provenance["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    @contextmanager
    def computing(self, stage: str, key: str) -> Iterator[Path]:
        """Yield the folder that `stage` fills; its provenance is written last, when the block has ended well.

        Files that an interrupted run with the same key left behind stay, so that the stage can resume.
        """
        folder = self.folder / stage
        begun = folder / "begun.json"
        if not begun.is_file() or read_json(begun) != {"key": key}:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(begun, {"key": key})
        drop(folder.rglob(f"{TEMPORARY}*"))
        started = time.monotonic()
        yield folder
        self._record(stage, key, started, [file for file in sorted(folder.rglob("*")) if file.is_file() and file != begun])
        begun.unlink()  # last: a run that is killed while files are hashed keeps them

    @contextmanager
    def computing_file(self, stage: str, key: str) -> Iterator[Path]:
        """Yield a temporary path for the one file of `stage`, which takes its place when the block has ended well."""
        path = self.folder / stage
        drop(path.parent.glob(f"{TEMPORARY}{path.stem}.*"))  # its own: others may be at work beside it
        started = time.monotonic()
        with replacing(path) as temporary:
            yield temporary
        self._record(stage, key, started, [path])

    def provenance(self, stage: str) -> dict | None:
        path = self._provenance_path(stage)
        return read_json(path) if path.is_file() else None

    def _provenance_path(self, stage: str) -> Path:
        path = self.folder / stage
        return path.with_suffix(".provenance.json") if path.suffix in {".json", ".ipynb"} else path / "provenance.json"

    def _record(self, stage: str, key: str, started: float, files: list[Path]) -> None:
        path = self._provenance_path(stage)
        provenance = {
            "key": key,
            "study": self.study.model_dump(mode="json"),
            "study_sha256": self.study.sha256,
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), **versions(COMPUTING + DRAWING)},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "device": self.study.device,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 2),
            "files": {str(file.relative_to(path.parent)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }
        write_json(path, provenance)

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "tables" / f"{name}.parquet")

    def claims(self) -> list[dict]:
        return read_json(self.folder / "claims.json")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, so that two runs never write to one place; wait where another run holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.parent} is in use by another run; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def drop(leftovers: Iterable[Path]) -> None:
    """Remove temporary files that a killed run left behind."""
    for leftover in list(leftovers):
        leftover.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_table(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def save_tensors(path: Path, tensors: dict, metadata: dict) -> None:
    """Write tensors with `metadata` (JSON values) in one safetensors file."""
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        # One entry: safetensors writes several in an order that changes from run to run.
        try:
            save_file(contiguous, temporary, {"metadata": json.dumps(metadata)})
        except SafetensorError as error:  # its own kind, also where the disk is full
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


def read_metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["metadata"])


def key_of(inputs: dict, modules: Iterable[str] = (), before: Iterable[str] = ()) -> str:
    """The hash of what a result depends on: inputs, source files of `modules`, keys of the stages `before`, versions."""
    source = {module: sha256(PACKAGE / module) for module in sorted(modules)}
    parts = {"inputs": inputs, "source": source, "before": list(before), "versions": versions()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(name: str) -> str | dict[str, str]:
    """What a path holds now, file by file; a name that is no path stands for itself."""
    path = Path(name)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return name


def versions(packages: Iterable[str] = COMPUTING) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def git_commit() -> str:
    """The commit of the checkout, with `+changes` where the working tree differs from it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
