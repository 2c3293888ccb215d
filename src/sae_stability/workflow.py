"""A study as jobs: Snakemake walks its plan on the cores of a machine or on a cluster.

It is the plan that one process walks in order (`pipeline`), and each of its stages is a job that calls `sae-stability stage`; the
seeds of a long training are several. Jobs compute in the dtype that is fastest where they were planned. `workflow/Snakefile` reads
the plan from a file written here, and knows nothing else of us. A job is done when its mark is there. The name of a mark holds the
key of what is computed, so that a change of code or inputs, which Snakemake does not follow through imports, runs again what it can
change.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_stability import costs, places
from sae_stability.errors import UserError
from sae_stability.experiments import Stage
from sae_stability.files import write_json
from sae_stability.keys import key_of
from sae_stability.pipeline import Plan, most_parts, part_of
from sae_stability.saes import FASTEST, fastest_dtype, variant
from sae_stability.study import Cell

FOLDER = "workflow"
SECONDS_A_JOB = 3600.0
"""A training that takes longer is cut into several jobs, of a seed at least."""
SPARE = 3.0
"""Times the estimate that a job may take: a cluster ends one that takes longer."""
SPARE_MEMORY = 1.5
"""Times the estimate that it may hold."""
LOCAL = "local"


@dataclass(frozen=True)
class Job:
    """A stage, or a part of one, as a job."""

    name: str
    """By which Snakemake calls it."""
    stage: Stage
    part: str
    """Such as `1/4`; empty where the stage is one job."""
    after: tuple[str, ...]
    """Names of the jobs that it reads."""
    key: str
    seconds: float
    memory_gb: float
    gpus: int

    @property
    def mark(self) -> str:
        """The name of the file that says that it is done."""
        return f"{self.name}-{self.key[:12]}"


def jobs(plan: Plan) -> list[Job]:
    """The jobs of a study, in an order in which they can run. Raises `UserError` for what `pipeline.check` would."""
    made: dict[str, tuple[str, ...]] = {}
    found = []
    for number, stage in enumerate(plan.stages):
        size = costs.size(plan, stage)
        parts = min(most_parts(stage), math.ceil(costs.seconds(stage.kind, size) / SECONDS_A_JOB))
        base = f"{number:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', stage.name.removeprefix('shared/'))}"
        made[stage.name] = tuple(base if parts == 1 else f"{base}_{part}" for part in range(1, parts + 1))
        after = tuple(job for before in stage.after for job in made[before])
        for part, name in enumerate(made[stage.name], 1):
            cut = part_of(stage, part, parts)
            own = costs.size(plan, cut)
            # The first seeds find the coefficient of a penalty, which the others take over.
            first = made[stage.name][:1] if part > 1 and _steered(stage.cell) else ()
            found.append(
                Job(
                    name,
                    cut,
                    f"{part}/{parts}" if parts > 1 else "",
                    (*after, *first),
                    key_of({"entries": cut.entries}, [], []),
                    costs.seconds(stage.kind, own),
                    costs.memory_gb(stage.kind, own),
                    int(plan.study.device == "cuda" and own is not None),
                )
            )
    return found


def _steered(cell: Cell | None) -> bool:
    return cell is not None and variant(cell.variant).steered and cell.coefficient is None


def write(plan: Plan, arguments: Sequence[str]) -> Path:
    """Write the plan for Snakemake, and the marks of what is done. `arguments` name the study as the command line does."""
    folder = plan.store.folder / FOLDER
    marks, logs = folder / "marks", folder / "logs"
    marks.mkdir(parents=True, exist_ok=True)
    threads = plan.study.threads or os.cpu_count() or 1
    every = jobs(plan)
    mark_of = {job.name: str(marks / job.mark) for job in every}
    for stale in {str(path) for path in marks.iterdir()} - set(mark_of.values()):
        Path(stale).unlink()
    rows: list[dict] = []
    for job in every:
        mark, log = Path(mark_of[job.name]), logs / f"{job.name}.log"
        if plan.is_done(job.stage):
            mark.touch(exist_ok=True)
        else:
            mark.unlink(missing_ok=True)
            log.unlink(missing_ok=True)  # of an earlier run
        command = [sys.executable, "-m", "sae_stability", "stage", arguments[0], job.stage.name, *arguments[1:]]
        row: dict = {"name": job.name, "key": job.key, "mark": str(mark), "log": str(log)}
        row |= {"after": [mark_of[name] for name in job.after]}
        row |= {"command": shlex.join([*command, *(["--part", job.part] if job.part else [])]), "threads": threads, "gpu": job.gpus}
        row |= {"runtime": math.ceil(SPARE * job.seconds / 60), "mem_mb": math.ceil(1000 * SPARE_MEMORY * job.memory_gb)}
        rows.append(row)
    path = folder / "plan.json"
    # Paths that a study names count from where it was called, and Snakemake works in a folder of its own.
    write_json(path, {"study": plan.study.name, "called_in": str(Path.cwd()), "jobs": rows})
    return path


def run(plan: Plan, arguments: Sequence[str], at_once: int | None, profile: str | None) -> None:
    """Compute what is missing of a study by Snakemake: `at_once` jobs on this machine, or as a profile says.

    Raises `UserError` where Snakemake or the profile is missing, and with the last line of each job that failed.
    """
    program = snakemake()
    settings = profile_folder(profile or LOCAL)
    plan.store.write_study()  # by which `clean` knows what jobs are about to make
    path = write(plan, arguments)
    threads = plan.study.threads or os.cpu_count() or 1
    command = [program, "--snakefile", str(places.root() / FOLDER / "Snakefile"), "--config", f"plan={path}"]
    command += ["--directory", str(path.parent), "--profile", str(settings), "--nolock"]  # the store has locks of its own
    if profile in (None, LOCAL):
        command += ["--cores", str((at_once or 1) * threads)]
    elif at_once is not None:
        command += ["--jobs", str(at_once)]
    # Jobs find the package where this process found it. Threads that wait in a loop would take the cores of other jobs.
    source = str(Path(__file__).parents[1])
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"SAE_STABILITY_ROOT": str(places.root())}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}
    environment |= {"SAE_STABILITY_RESULTS": str(places.results())}
    environment |= {FASTEST: str(fastest_dtype(torch.device(plan.study.device))).removeprefix("torch.")}
    done = subprocess.run(command, env=environment, cwd=Path.cwd(), check=False)
    if done.returncode != 0:
        told = "; ".join(_failures(plan)) or f"snakemake ended with status {done.returncode}; see its lines above"
        raise UserError(f"jobs: {told}; what was computed is kept, call the same command again to go on")


def snakemake() -> str:
    """The program: what `SAE_STABILITY_SNAKEMAKE` names, or what lies beside this interpreter or on the PATH.

    Raises `UserError` where it is not installed.
    """
    beside = Path(sys.executable).with_name("snakemake")
    found = os.environ.get("SAE_STABILITY_SNAKEMAKE") or (str(beside) if beside.is_file() else shutil.which("snakemake"))
    if found is None:
        raise UserError(
            "jobs: Snakemake is not installed; call pip install 'snakemake>=9' snakemake-executor-plugin-slurm in an environment "
            "on the PATH, or leave --jobs and --profile out"
        )
    return found


def profile_folder(name: str) -> Path:
    """The folder of a profile of ours, or of the user's own. Raises `UserError` where there is none."""
    ours = places.root() / FOLDER / "profiles"
    for folder in (ours / name, Path(name).absolute()):
        if (folder / "config.yaml").is_file():
            return folder
    known = ", ".join(sorted(path.name for path in ours.iterdir())) if ours.is_dir() else "none"
    raise UserError(f"--profile {name}: no such profile; there are {known}, or give a folder with a config.yaml")


def _failures(plan: Plan) -> Iterator[str]:
    """Of each job that has a log and is not done, its name and the last line that it wrote."""
    for job in jobs(plan):
        folder = plan.store.folder / FOLDER
        log = folder / "logs" / f"{job.name}.log"
        if log.is_file() and not (folder / "marks" / job.mark).exists():
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no word").removeprefix("sae-stability: ")
            yield f"{job.stage.name}: {last} ({log})"


def foreseen(plan: Plan) -> Iterator[str]:
    """What would run, and about what it would take, in lines. How large a model is, is known once its text is tokenised."""
    total, unknown = costs.START_SECONDS, 0
    for stage in plan.stages:
        done, known = plan.is_done(stage), costs.is_known(plan, stage)
        size = costs.size(plan, stage) if known else None
        seconds, memory = costs.seconds(stage.kind, size) - costs.START_SECONDS, costs.memory_gb(stage.kind, size)
        told = f"{seconds / 60:7.1f} min {memory:6.1f} GB" if known else f"{'?':>7} min {'?':>6} GB"
        yield f"{'done   ' if done else 'missing'} {told}  {stage.name}"
        if not done:
            total, unknown = total + seconds, unknown + (not known)
    if unknown:
        needed = "sae-stability check, with the same --set, has read model and text"
        yield f"{unknown} of {len(plan.stages)} stages can't be foretold before {needed}"
    else:
        yield f"about {total / 3600:,.1f} hours one after another in one process, as stages took elsewhere"
