"""Files that are whole or not there, and locks. Every result is written through here, and takes its place once it is complete.

The command line reads studies through it: PyTorch and pandas, which take seconds to import, are left to what needs them.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

TEMPORARY = ".writing-"
"""How the folders begin that files are written in."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems answer that have no locks."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` once the block has ended well.

    It lies in a folder of its own beside `path`, so that what a library leaves beside the file that it writes is found too
    (safetensors has temporary files of its own). The file may be read by whom the user's mask lets read it. Raises `OSError` with
    `errno.ENOSPC` where the disk is full, whichever library was writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}-"))
    temporary = folder / path.name
    try:
        with telling_of_a_full_disk(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        like = folder / "like"  # a file as any is made: some libraries make theirs for the user alone
        like.touch()
        with suppress(PermissionError):  # some mounts have no modes
            temporary.chmod(stat.S_IMODE(like.stat().st_mode))
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def telling_of_a_full_disk(path: Path) -> Iterator[None]:
    """Libraries that write have errors of their own kinds for a full disk: here they become the system's."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = f"os error {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC) in str(error)
        if full and getattr(error, "errno", None) != errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


@contextmanager
def locked(path: Path, described: Path) -> Iterator[None]:
    """Hold the lock file `path`; say what is waited for where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{described} is in use by another run; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{described}: this file system has no locks; run one study at a time on it", file=sys.stderr, flush=True)
        yield


def drop(leftovers: Iterable[Path]) -> None:
    """Remove the temporary folders that a killed run left behind."""
    for leftover in list(leftovers):
        shutil.rmtree(leftover, ignore_errors=True)


def below(folder: Path, *patterns: str) -> list[Path]:
    """Everything below a folder whose name fits one of some shell patterns, in order.

    Others may write there: what they take away while this looks is passed over, where `Path.rglob` fails before Python 3.13.
    """
    places = ((Path(path), [*folders, *names]) for path, folders, names in os.walk(folder))
    return sorted(place / name for place, held in places for name in held if any(fnmatchcase(name, each) for each in patterns))


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_table(path: Path, table: "pd.DataFrame") -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict) -> None:
    """Write tensors with `metadata` (JSON values) in one safetensors file."""
    import safetensors.torch

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        # One entry: safetensors writes several in an order that changes from run to run.
        safetensors.torch.save_file(contiguous, temporary, {"metadata": json.dumps(metadata)})


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write NumPy arrays in one safetensors file."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with replacing(path) as temporary:
        safetensors.numpy.save_file(contiguous, temporary)


def read_metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["metadata"])


def path_of(name: str) -> Path:
    """A path as a user writes it; the home of a user that there is not stays as it is written."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def readings(name: str) -> list[tuple[str, str]]:
    """How a name may be read that can say more behind a question mark: as a place and what is told of it, longest place first.

    A question mark may also be part of a file's name.
    """
    marks = [position for position, sign in enumerate(name) if sign == "?"]
    return [(name, ""), *((name[:mark], name[mark + 1 :]) for mark in reversed(marks))]


def exists(path: Path) -> bool:
    """Whether there is something; at a name that is none, too long or with a null byte, there is nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(name: str) -> str | dict[str, str]:
    """What a path holds now, file by file; a name that is no path stands for itself."""
    path = Path(name)
    if path.is_file():
        return _content(path)
    if path.is_dir():
        return {str(file.relative_to(path)): _content(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return name


def _content(path: Path) -> str:
    status = path.stat()
    return _content_at(path, status.st_size, status.st_mtime_ns)


@cache
def _content_at(path: Path, _size: int, _changed: int) -> str:
    return sha256(path)
