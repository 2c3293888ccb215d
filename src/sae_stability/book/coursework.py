"""Course packs: the exercises of `coursework/` as notebooks by nbgrader's conventions, with solutions and without.

Each file is an exercise: its text with a level and a chapter, what is given, a solution, a test with its points, and wrong
solutions that the test has to find out. Those are for the exercise's own test, and no pack has them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import replacing

LEVELS = ("read", "compute", "design")
PART = re.compile(r"^# %% (.+)$", re.M)
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n?", re.M | re.S)
HIDDEN = re.compile(r"^ *### BEGIN HIDDEN TESTS\n.*?^ *### END HIDDEN TESTS\n?", re.M | re.S)
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()\n"
"""What nbgrader puts in the place of a solution."""

TOLD = """# A course on seed dependence in sparse autoencoders

`source/` holds each week with solutions and tests, as nbgrader takes it; `student/` is the same without solutions and hidden tests.

    nbgrader generate_assignment week-1    # writes release/, what students get
    nbgrader autograde week-1              # grades what stands in submitted/STUDENT/week-1/

Both want `sae-stability` in the environment of the notebooks' kernel, and the results of the study `quick`, which
`sae-stability run quick` computes once, in some minutes.
"""
CONFIG = 'c = get_config()  # noqa: F821\nc.CourseDirectory.course_id = "sae-stability"\n'


@dataclass(frozen=True)
class Part:
    """A cell of an exercise, or a wrong solution."""

    kind: str
    """`[markdown]`, `given`, `solution`, `test` or `wrong`."""
    about: tuple[str, ...]
    """Of a text its level and chapter, of a test its points."""
    source: str


@dataclass(frozen=True)
class Exercise:
    """What a student is asked, or how a week begins."""

    name: str
    parts: tuple[Part, ...]

    def of(self, kind: str) -> list[Part]:
        return [part for part in self.parts if part.kind == kind]

    @property
    def title(self) -> str:
        return self.parts[0].source.partition("\n")[0].lstrip("# ")

    @property
    def points(self) -> int:
        return sum(int(part.about[0]) for part in self.of("test"))

    @property
    def level(self) -> str:
        return self.parts[0].about[0]

    @property
    def chapter(self) -> str:
        return self.parts[0].about[1]


def weeks() -> dict[str, list[Exercise]]:
    """The exercises of each week, behind how it begins, in their order."""
    folders = sorted(folder for folder in (places.root() / "coursework").iterdir() if folder.is_dir())
    return {folder.name: [read(path) for path in sorted(folder.glob("*.py"))] for folder in folders}


def read(path: Path) -> Exercise:
    _, *split = PART.split(path.read_text(encoding="utf-8"))
    parts = []
    for heading, body in zip(split[::2], split[1::2], strict=True):
        kind, *about = heading.split()
        source = body.strip("\n")
        if kind == "[markdown]":
            source = re.sub(r"^# ?", "", source, flags=re.M)
        parts.append(Part(kind, tuple(about), source))
    return Exercise(path.stem, tuple(parts))


def notebook(week: str, exercises: list[Exercise], student: bool) -> NotebookNode:
    """A week as a notebook, with solutions and all tests, or as students get it."""
    cells = [cell for exercise in exercises for cell in _cells(exercise, student)]
    for number, cell in enumerate(cells):
        cell["id"] = f"{week}-{number:02d}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def _cells(exercise: Exercise, student: bool) -> Iterator[NotebookNode]:
    for position, part in enumerate(part for part in exercise.parts if part.kind != "wrong"):
        source = part.source
        if student:
            source = HIDDEN.sub("", SOLUTION.sub(STUB, f"{source}\n")).rstrip("\n")
        make = nbformat.v4.new_markdown_cell if part.kind == "[markdown]" else nbformat.v4.new_code_cell
        graded, solved = part.kind == "test", part.kind == "solution"
        about = {"grade": graded, "grade_id": f"{exercise.name}-{position}", "locked": not solved, "solution": solved}
        about |= {"points": int(part.about[0])} if graded else {}
        yield make(source, metadata={"nbgrader": {**about, "schema_version": 3, "task": False}})


def write(out: Path) -> list[Path]:
    """Write a course pack into a new folder: the notebooks that stand in it.

    Raises `UserError` where the folder holds something.
    """
    if not (places.root() / "coursework").is_dir():
        raise UserError(f"coursework: there are no exercises in {places.root()}; call it from a checkout")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder")
    written = []
    for week, exercises in weeks().items():
        for folder, student in (("source", False), ("student", True)):
            path = out / folder / week / f"{week}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(notebook(week, exercises, student), path)
            written.append(path)
    for name, text in (("README.md", TOLD), ("nbgrader_config.py", CONFIG)):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return written
