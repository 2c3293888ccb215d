"""Training that is killed at random moments, or has no disk left, and goes on to the same bits."""

import errno
import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sae_stability import files
from sae_stability.study import Cell
from sae_stability.training import train

KILLS = 20  # while SAEs train: a run is killed once it has compiled what it needs
CELL = Cell(
    model="none",
    hook_name="blocks.0.hook_resid_post",
    tokens=3000,
    passes=2,
    d_sae=64,
    k=4,
    seeds=3,
    batch=64,
    dead_after=2000,
)


def run(variant: str, folder: Path, ready) -> None:
    """Train into a folder, with a checkpoint as often as the loop comes by. `ready`: what the run needs is compiled."""
    torch.set_num_threads(2)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32) ** 3)
    cell = CELL.model_copy(update={"variant": variant, "coefficient": 1.0})
    train(cell.model_copy(update={"tokens": 640}), x[:640], [0])
    ready.set()
    train(cell, x, [0, 1, 2], folder, at_once=2, checkpoint_seconds=0.0)


def contents(folder: Path) -> dict[str, str]:
    whole = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in whole}


def ready(context, variant: str, folder: Path):
    """A process that begins to train now."""
    event = context.Event()
    process = context.Process(target=run, args=(variant, folder, event))
    process.start()
    assert event.wait(300)
    return process


def undisturbed(context, variant: str, folder: Path) -> float:
    """How many seconds a run trains that nobody kills."""
    calm, started = ready(context, variant, folder / "calm"), time.monotonic()
    calm.join()
    assert calm.exitcode == 0
    return time.monotonic() - started


def kill_again_and_again(context, variant: str, folder: Path, kills: int, seconds: float) -> int:
    """SIGKILL runs of a variant `kills` times or a few more, and compare what they leave with an undisturbed run's."""
    moments = random.Random(variant)
    done, attempt = 0, 0
    while done < kills:
        attempt += 1
        process = None
        while process is None or process.exitcode != 0:
            process = ready(context, variant, folder / str(attempt))
            process.join(moments.uniform(0, 0.8) * seconds)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                done += 1
            assert process.exitcode in (0, -signal.SIGKILL)
        assert contents(folder / str(attempt)) == contents(folder / "calm")
    return done


def test_runs_killed_at_random_moments_end_in_the_same_bits(tmp_path):
    context = multiprocessing.get_context("forkserver")
    done = 0
    # Not in threads: to start a process polls all others, and only one may read how one ended.
    for variant in ("topk", "matryoshka"):
        seconds = undisturbed(context, variant, tmp_path / variant)
        done += kill_again_and_again(context, variant, tmp_path / variant, KILLS // 2, seconds)
    assert done >= KILLS


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    cell = CELL.model_copy(update={"tokens": 2048, "passes": 2})
    train(cell, x, [0, 1], tmp_path / "calm", checkpoint_seconds=0)
    save, calls = safetensors.torch.save_file, iter(range(10**6))

    def full(tensors, path, metadata):
        if next(calls) == 4:
            Path(path).write_bytes(b"half a checkpoi")
            raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as stopped:
        train(cell, x, [0, 1], tmp_path / "full", checkpoint_seconds=0)
    assert stopped.value.errno == errno.ENOSPC
    assert not list((tmp_path / "full").rglob(f"{files.TEMPORARY}*"))
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    train(cell, x, [0, 1], tmp_path / "full", checkpoint_seconds=0)
    assert contents(tmp_path / "full") == contents(tmp_path / "calm")
