"""Where results live: locks, checksums, provenance. Nothing half-written or altered is ever taken for a result.

Results of a study stand in `results/STUDY/`, one folder an entry. What several studies can use (texts, activations, trained SAEs)
stands in `results/_shared/`, under names that hold their keys. An entry is done when the provenance beside it holds its key, and
its files are, byte for byte, those that the provenance names. Anything else is computed again.

Readers take no lock. Whoever computes an entry holds its lock, and looks again once it has it.
"""

import hashlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from sae_stability import places
from sae_stability.files import TEMPORARY, below, drop, locked, read_json, replacing, sha256, write_json
from sae_stability.keys import versions
from sae_stability.study import Study

COMPUTING = ("torch", "numpy", "numba", "scipy", "pandas", "pyarrow", "transformers", "transformer-lens", "tokenizers", "datasets")
DRAWING = ("matplotlib", "seaborn", "papermill", "jupyter-book")
SHARED = "shared"
"""First part of the names of entries that all studies share."""
FILES = (".json", ".ipynb")
"""Endings of entries that are a single file; all others are folders."""
PROVENANCE, BEGUN, SCRATCH = "provenance.json", "begun.json", ".scratch"


@dataclass(frozen=True)
class Work:
    """Where a stage writes."""

    folders: dict[str, Path]
    """Of each entry that is missing, by its name; the path itself of an entry that is a file."""
    scratch: Path
    """For what outlives a kill and is no result; not made yet, and gone once the entries are recorded."""

    @property
    def folder(self) -> Path:
        """That of the only entry."""
        (folder,) = self.folders.values()
        return folder


@dataclass(frozen=True, eq=False)
class Store:
    """The results of one study, and those that it shares with others."""

    study: Study

    @property
    def folder(self) -> Path:
        return places.results() / self.study.name

    def path(self, entry: str) -> Path:
        """The folder, or the file, of an entry."""
        first, _, rest = entry.partition("/")
        return places.results() / "_shared" / rest if first == SHARED else self.folder / entry

    def is_done(self, entry: str, key: str) -> bool:
        """Whether `entry` was computed with `key`, and its files are what they were then. One that was altered is named."""
        provenance = self.provenance(entry)
        if provenance is None or provenance["key"] != key:
            return False
        return not self._altered(entry, provenance, told=True)

    def _altered(self, entry: str, provenance: dict, told: bool = False) -> bool:
        """Whether a file of an entry is missing or has other bytes than when it was computed."""
        folder = _provenance_path(self.path(entry)).parent

        def differs(name: str) -> bool:
            path, wanted = folder / name, provenance["files"][name]
            if not path.is_file():
                return True
            status = path.stat()
            if status.st_size == wanted["bytes"] and _sha256_at(path, status.st_size, status.st_mtime_ns) == wanted["sha256"]:
                return False
            if told:
                print(f"{path} was altered since it was computed; it is computed again", file=sys.stderr, flush=True)
            return True

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
            return any(list(pool.map(differs, provenance["files"])))

    @contextmanager
    def computing(self, group: str, entries: dict[str, str]) -> Iterator[Work]:
        """Yield where some entries of a group (by name, with their keys) are written: folders, or a temporary path for a file.

        Their provenance is written last, when the block has ended well. Files that an interrupted run with the same keys left
        behind stay, so that a computation can resume. Whoever computes holds the lock (`locked`).
        """
        purpose = hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest()[:12]
        scratch = self.path(group) / SCRATCH / purpose
        if len(entries) == 1 and (entry := next(iter(entries))).endswith(FILES):
            with self.computing_file(entry, entries[entry]) as path:
                yield Work({entry: path}, scratch)
            return
        started = time.monotonic()
        work = Work({entry: self._begun(entry, key) for entry, key in entries.items()}, scratch)
        yield work
        seconds = (time.monotonic() - started) / len(entries)
        for entry, key in entries.items():
            folder = work.folders[entry]
            self._record(entry, key, seconds, _results(folder))
            (folder / BEGUN).unlink(missing_ok=True)  # last: a run that is killed while files are hashed keeps them
        shutil.rmtree(scratch.parent, ignore_errors=True)
        with suppress(OSError):
            self.path(group).rmdir()  # that of a part of a stage holds nothing else

    def _begun(self, entry: str, key: str) -> Path:
        folder = self.path(entry)
        begun = folder / BEGUN
        if not begun.is_file() or _read(begun) != {"key": key}:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(begun, {"key": key})
        drop(folder.rglob(f"{TEMPORARY}*"))
        return folder

    @contextmanager
    def computing_file(self, entry: str, key: str) -> Iterator[Path]:
        """Yield a temporary path for the one file of `entry`, which takes its place when the block has ended well."""
        path = self.path(entry)
        drop(path.parent.glob(f"{TEMPORARY}{path.stem}.*"))  # its own: others may be at work beside it
        started = time.monotonic()
        with replacing(path) as temporary:
            yield temporary
        self._record(entry, key, time.monotonic() - started, [path])

    def provenance(self, entry: str) -> dict | None:
        path = _provenance_path(self.path(entry))
        return _read(path) if path.is_file() else None

    def _record(self, entry: str, key: str, seconds: float, files: list[Path]) -> None:
        path = _provenance_path(self.path(entry))
        provenance = {
            "entry": entry,
            "key": key,
            "study": self.study.model_dump(mode="json"),
            "study_sha256": self.study.sha256,
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), **versions(COMPUTING + DRAWING)},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "processor": processor(),
            "device": self.study.device,
            "threads": self.study.threads or os.cpu_count(),
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(peak_memory_gb(), 2),
            "files": {str(file.relative_to(path.parent)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }
        write_json(path, provenance)

    @contextmanager
    def locked(self, entries: Iterable[str]) -> Iterator[None]:
        """Hold the locks of some entries, so that two runs never compute one of them; wait where another run holds one."""
        with ExitStack() as held:
            for path in sorted(map(self.path, entries)):  # all in one order, so that nobody waits for who waits for him
                name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
                held.enter_context(locked(places.results() / "_locks" / name, path))
            yield

    def table(self, name: str) -> pd.DataFrame:
        """A table of the study: all cells, one below the other."""
        return pd.read_parquet(self.folder / "tables" / f"{name}.parquet")

    def claims(self) -> list[dict]:
        return read_json(self.folder / "claims.json")

    def write_study(self, anew: bool = True) -> None:
        """Write the study down, for whoever opens its results by name; unless `anew`, only where no study of that name is."""
        path, fields = self.folder / "study.json", self.study.model_dump(mode="json")
        if not path.is_file() or (anew and _read(path) != fields):
            write_json(path, fields)


def owned(folder: Path) -> list[Path]:
    """The entries below a folder, finished or begun: each is pruned as a whole, with what lies in it."""
    marks = below(folder, PROVENANCE, BEGUN, f"*.{PROVENANCE}", SCRATCH)
    entries = {mark.parent if mark.name in (PROVENANCE, BEGUN) else mark for mark in marks}
    return sorted(entry for entry in entries if entries.isdisjoint(entry.parents))


def size(paths: Sequence[Path]) -> int:
    """Bytes of files and folders."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return sum(file.stat().st_size for file in files)


def _results(folder: Path) -> list[Path]:
    """The files of an entry, without those that only say where its computation stands."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and SCRATCH not in file.relative_to(folder).parts)
    return [file for file in files if file.name not in (BEGUN, PROVENANCE)]


def _provenance_path(path: Path) -> Path:
    return path.with_suffix(f".{PROVENANCE}") if path.name.endswith(FILES) else path / PROVENANCE


def _read(path: Path) -> dict | None:
    """A JSON file of the store's own; None where it was damaged, so that its entry counts as not computed."""
    try:
        return read_json(path)
    except ValueError:
        print(f"{path} is damaged; what it stands beside is computed again", file=sys.stderr, flush=True)
        return None


@cache
def _sha256_at(path: Path, _size: int, _changed: int) -> str:
    return sha256(path)


def git_commit() -> str:
    """The commit of the checkout, with `+changes` where the working tree differs from it."""
    commit, changed = places.git("rev-parse", "HEAD"), places.git("status", "--porcelain")
    return "unknown" if commit is None or changed is None else commit + ("+changes" if changed else "")


@cache
def processor() -> str:
    """The processor's model, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
