import re

import matplotlib.pyplot as plt
import nbformat
import pytest

from sae_stability import cli
from sae_stability.book import build, coursework
from sae_stability.errors import UserError

WEEKS = coursework.weeks()
EXERCISES = [(week, exercise) for week, (_, *exercises) in WEEKS.items() for exercise in exercises]


@pytest.fixture
def names(quick):
    """What a student's notebook knows: how the week begins, and what the exercise gives."""

    def of(week: str, exercise: coursework.Exercise) -> dict:
        known: dict = {}
        for part in (*WEEKS[week][0].of("given"), *exercise.of("given")):
            exec(part.source, known)
        plt.close("all")
        return known

    return of


def passes(known: dict, answer: str, test: str) -> bool:
    try:
        exec(answer, known)
        exec(test, known)
    except Exception:
        return False
    return True


def test_a_course_has_exercises_of_every_level_and_chapter():
    assert len(EXERCISES) >= 24
    assert {exercise.level for _, exercise in EXERCISES} == set(coursework.LEVELS)
    theirs = {exercise.chapter for _, exercise in EXERCISES}
    assert theirs <= set(build.chapters())
    assert set(build.chapters()) - theirs == {"index", "teaching"}
    for _, exercise in EXERCISES:
        kinds = [part.kind for part in exercise.parts]
        assert [kinds.count(kind) for kind in ("[markdown]", "solution", "test")] == [1, 1, 1], exercise.name
        assert kinds.count("wrong") >= 3, exercise.name


@pytest.mark.parametrize(("week", "exercise"), EXERCISES, ids=[f"{week}/{exercise.name}" for week, exercise in EXERCISES])
def test_the_solution_passes_and_every_wrong_one_fails(names, week, exercise):
    (solution,), (test,) = exercise.of("solution"), exercise.of("test")
    known = names(week, exercise)
    assert passes(dict(known), solution.source, test.source)
    assert not passes(dict(known), coursework.SOLUTION.sub(coursework.STUB, f"{solution.source}\n"), test.source)
    for number, wrong in enumerate(exercise.of("wrong")):
        assert not passes(dict(known), wrong.source, test.source), f"wrong solution {number}"
        compile(wrong.source, exercise.name, "exec")


OTHERWISE = {
    "02-stability": """
def stability(W, threshold):
    W = torch.as_tensor(W)
    best = torch.einsum("sid,tjd->stij", W, W).amax(3)
    back = (best >= threshold).double()
    back[range(len(W)), range(len(W))] = 0
    return back.sum(1) / (len(W) - 1)
""",
    "06-a-null": """
def surrogate(x, rng):
    values, axes = np.linalg.eigh(np.cov(x, rowvar=False))
    return (rng.standard_normal(x.shape) * np.sqrt(values)) @ axes.T + x.mean(axis=0)
""",
    "07-cliffs-delta": """
def cliffs_delta(a, b):
    b = np.sort(b)
    return (np.searchsorted(b, a, "left") - (len(b) - np.searchsorted(b, a, "right"))).mean() / len(b)
""",
    "05-a-world": """
def world(d_in, r, tokens, rng):
    basis = np.linalg.svd(rng.normal(size=(d_in, d_in)))[0][:, :r]
    directions = rng.normal(size=(tokens, r))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return 3 * directions @ basis.T, basis
""",
    "02-one-to-one": """
def mcc(A, B):
    return max(np.trace(A @ B[list(order)].T) for order in permutations(range(len(B)))) / len(A)
""",
    "09-copy-or-seed": """
def is_copy(A, B):
    from scipy.spatial.distance import cdist
    apart = cdist(A, B, "cosine")
    return len(A) == len(B) and (apart.min(0) < 1e-5).all() and (apart.min(1) < 1e-5).all()
""",
    "05-a-variant": """
class AbsTopK(DenseTopK):
    def forward(self, sae, x, training):
        pre = (x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc
        least = pre.abs().sort(dim=1, descending=True).values[:, self.k - 1 : self.k]
        z = pre * (pre.abs() >= least)
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, ((x - x_hat) ** 2).sum(-1).mean())
""",
}
"""Other right solutions of some exercises."""


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_right_solutions_pass(names, name):
    ((week, exercise),) = [(week, exercise) for week, exercise in EXERCISES if exercise.name == name]
    (test,) = exercise.of("test")
    assert passes(names(week, exercise), OTHERWISE[name], test.source)


def test_a_pack_has_both_versions_and_students_see_no_solution(tmp_path, capsys):
    out = tmp_path / "course"
    cli.app(["coursework", str(out)], standalone_mode=False)
    told = capsys.readouterr().out.split()
    assert told == [str(out / of / week / f"{week}.ipynb") for week in WEEKS for of in ("source", "student")]
    for week in WEEKS:
        full, seen = (nbformat.read(out / of / week / f"{week}.ipynb", as_version=4) for of in ("source", "student"))
        for notebook in (full, seen):
            nbformat.validate(notebook)
            ids = [cell.metadata.nbgrader.grade_id for cell in notebook.cells]
            assert len(set(ids)) == len(ids)
        assert [cell.metadata for cell in full.cells] == [cell.metadata for cell in seen.cells]
        text = "\n".join(cell.source for cell in seen.cells)
        assert "SOLUTION" not in text
        assert "HIDDEN" not in text
        solved = [cell for cell in seen.cells if cell.metadata.nbgrader.solution]
        assert len(solved) == len(WEEKS[week]) - 1
        assert all(cell.source.endswith("raise NotImplementedError()") for cell in solved)
        graded = [cell for cell in seen.cells if cell.metadata.nbgrader.grade]
        assert all(
            cell.metadata.nbgrader.points > 0 and "assert" in cell.source and cell.metadata.nbgrader.locked for cell in graded
        )
        assert "# %% wrong" not in "\n".join(cell.source for cell in full.cells)
        for exercise in WEEKS[week][1:]:
            for wrong in exercise.of("wrong"):
                assert all(cell.source.strip() != wrong.source.strip() for cell in full.cells)
    with pytest.raises(UserError, match=re.escape(str(out))):
        coursework.write(out)
