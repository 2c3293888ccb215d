from types import SimpleNamespace

import pandas as pd

from sae_stability.book import page


def line(cell: str, value: float | None, verdict: str, scope: str = "in this model") -> dict:
    ends = {"ci_low": None, "ci_high": None} if value is None else {"ci_low": value - 0.1, "ci_high": value + 0.1}
    return {"id": "C2", "cell": cell, "verdict": verdict, "scope": scope, "value": value, **ends}


def grid(cells: pd.DataFrame, lines: list[dict]) -> SimpleNamespace:
    """What a table of the grid asks of a book."""
    by_cell = {each["cell"]: each for each in lines}
    return SimpleNamespace(others=lambda: cells, claim=lambda claim, cell: by_cell[cell])


def test_an_estimate_without_a_value_is_not_defined():
    assert page.estimate(0.256, ".0%") == "26%"
    assert page.estimate(float("nan"), ".0%") == page.estimate(None) == "not defined"


def test_an_interval_that_does_not_exist_is_left_out():
    row = pd.Series({"share": 0.5, "share_low": float("nan"), "share_high": float("nan")})
    assert page.interval(row, "share", ".0%") == "50%"
    assert page.interval(row.fillna(0.25), "share", ".0%") == "50% [25%, 25%]"
    assert page.interval(row * float("nan"), "share", ".0%") == "not defined"


def test_verdicts_stand_beside_what_tells_cells_apart():
    cells = pd.DataFrame({"cell": ["a", "b"], "name": ["d_sae=64", "d_sae=128 †"], "cell_on_target": [True, False]})
    holds_raw = "in this model; it holds raw, and not beside the features that it is matched with"
    table = page.by_claim(
        grid(cells, [line("a", 0.5, "supported"), line("b", None, "inconclusive", holds_raw)]), {"C2": "C2: most"}
    )
    assert "| cell | C2: most |" in table
    assert "| d_sae=64 | supported: 0.50 [0.40, 0.60] |" in table
    assert "| d_sae=128 † | inconclusive, raw only: not defined |" in table
    assert table.endswith("\n\nA dagger marks a cell that misses its L0.")


def test_a_dagger_is_explained_only_where_one_stands():
    cells = pd.DataFrame({"cell": ["a"], "name": ["relu"], "cell_on_target": [True]})
    assert "dagger" not in page.by_claim(grid(cells, [line("a", 0.5, "supported")]), {"C2": "C2"})


def test_a_study_of_one_cell_says_how_to_have_more():
    cells = pd.DataFrame({"cell": [], "name": [], "cell_on_target": []})
    assert "one cell" in page.by_claim(grid(cells, []), {"C2": "C2"})
