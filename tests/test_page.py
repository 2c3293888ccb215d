import html
import re
from types import SimpleNamespace
from typing import get_args

import pandas as pd
from markdown_it import MarkdownIt

from sae_stability import ledger
from sae_stability.book import build, page
from sae_stability.book.tables import Book
from sae_stability.statistics import Interval
from sae_stability.study import Study, told_apart


def line(cell: str, value: float | None, verdict: str, scope: str = "in this model") -> dict:
    ends = {"ci_low": None, "ci_high": None} if value is None else {"ci_low": value - 0.1, "ci_high": value + 0.1}
    return {"id": "C2", "line": "as stated", "cell": cell, "verdict": verdict, "scope": scope, "value": value, **ends}


def grid(cells: pd.DataFrame, lines: list[dict]) -> SimpleNamespace:
    """What a table of the grid asks of a book."""
    by_line = {(each["cell"], each["line"]): each for each in lines}
    return SimpleNamespace(others=lambda: cells, claim=lambda claim, cell, line: by_line[cell, line])


def test_an_estimate_without_a_value_is_not_defined():
    assert page.estimate(0.256, ".0%") == "26%"
    assert page.estimate(float("nan"), ".0%") == page.estimate(None) == "not defined"


def test_an_interval_that_does_not_exist_is_left_out():
    row = pd.Series({"share": 0.5, "share_low": float("nan"), "share_high": float("nan")})
    assert page.interval(row, "share", ".0%") == "50%"
    assert page.interval(row.fillna(0.25), "share", ".0%") == "50% [25%, 25%]"
    assert page.interval(row * float("nan"), "share", ".0%") == "not defined"


def test_verdicts_of_each_line_stand_beside_what_tells_cells_apart():
    cells = pd.DataFrame({"cell": ["a", "b"], "name": ["d_sae=64", "d_sae=128 †"], "cell_on_target": [True, False]})
    lines = []
    for each in get_args(ledger.Line):
        lines += [line("a", 0.5, "supported") | {"line": each}, line("b", None, "inconclusive") | {"line": each}]
    lines[2] |= {"verdict": "opposite"}
    table = page.by_line(grid(cells, lines), ["C2"]).splitlines()
    assert table[0] == "| cell | C2 as stated | C2 beyond size and noise | C2 beyond energy and frequency |"
    assert table[2] == "| d_sae=64 | supported: 0.50 [0.40, 0.60] | opposite: 0.50 [0.40, 0.60] | supported: 0.50 [0.40, 0.60] |"
    assert table[3].startswith("| d_sae=128 † | inconclusive: not defined |")
    assert table[-1] == "A dagger marks a cell that misses its L0."
    whole = cells[:1]
    assert "dagger" not in page.by_line(grid(whole, lines), ["C2"])


def test_a_study_of_one_cell_says_how_to_have_more():
    cells = pd.DataFrame({"cell": [], "name": [], "cell_on_target": []})
    assert "one cell" in page.by_line(grid(cells, []), ["C2"])


KEYS = {
    "model": "docstrings-2l",
    "hook_name": "blocks.1.hook_resid_pre",
    "tokens": 1000,
    "batch": 100,
    "d_sae": 64,
    "k": 4,
    "seeds": 4,
}


def book_of(grid: dict | None = None, claims: list[dict] | None = None, tables: dict | None = None, **keys) -> Book:
    """A book whose results are given, and not computed."""
    study = Study(name="planted", grid=grid or {}, **(KEYS | keys))
    store = SimpleNamespace(study=study, claims=lambda: claims or [], table=lambda name: (tables or {})[name])
    return Book(SimpleNamespace(study=study, store=store, stages=[]))


def cells_of(study: Study, **columns) -> pd.DataFrame:
    return pd.DataFrame({"cell": list(study.cells), "cell_on_target": True, **columns})


def test_a_table_has_one_line_a_row_and_keeps_counts_whole():
    rows = pd.DataFrame({"seed": [0, 1], "l0": [8.0, 7.96]})
    table = page.markdown_table(rows, {"seed": "{seed}", "L0": "{l0:.1f}", "twice": lambda row: f"{2 * row['seed']}"})
    assert table.splitlines() == ["| seed | L0 | twice |", "| --- | --- | --- |", "| 0 | 8.0 | 0 |", "| 1 | 8.0 | 2 |"]


def test_a_ledger_of_two_cells_gives_each_its_own_lines():
    book = book_of({"seeds": [3]})  # the same recipe twice, with other seeds
    main, other = book.study.cells
    book = book_of({"seeds": [3]}, [line(other, 0.2, "not supported"), line(main, 0.6, "supported")])
    assert book.claim("C2")["value"] == 0.6
    assert book.claim("C2", other)["value"] == 0.2
    assert [each["cell"] for each in book.lines] == [main]


def test_cells_of_a_grid_are_named_by_what_tells_them_from_each_other():
    grid = {"variant": ["topk", "relu"], "seeds": [3], "tokens": [500]}  # all of it has fewer tokens: that tells none apart
    tables = {"cells": cells_of(book_of(grid).study)}
    assert list(book_of(grid, tables=tables).others()["name"]) == ["topk", "relu"]
    grid = {"variant": ["topk", "relu"], "d_sae": [32, 64]}
    tables = {"cells": cells_of(book_of(grid).study).assign(cell_on_target=[True, True, False, True])}
    assert list(book_of(grid, tables=tables).others()["name"]) == ["topk, d_sae=32", "relu, d_sae=32 †", "relu, d_sae=64"]


def test_the_only_other_cell_is_named_by_what_tells_it_from_the_main_cell():
    grid = {"threshold": [0.5]}
    tables = {"cells": cells_of(book_of(grid).study)}
    assert list(book_of(grid, tables=tables).others()["name"]) == ["threshold=0.5"]


def test_cells_that_differ_in_seeds_alone_are_named_by_them():
    grid = {"seeds": [2, 3]}
    tables = {"cells": cells_of(book_of(grid).study)}
    assert list(book_of(grid, tables=tables).others()["name"]) == ["seeds=2", "seeds=3"]


def test_a_table_that_the_study_lacks_is_empty():
    book = book_of()
    book.plan.store.table = lambda name: pd.read_parquet(f"no/{name}.parquet")
    assert book.others("translations").empty


def test_stages_are_those_of_the_plan_each_with_all_of_its_entries():
    provenances = {
        "seeds/0": {"seconds": 2.0, "peak_memory_gb": 1.0, "machine": "this one"},
        "seeds/1": {"seconds": 3.0, "peak_memory_gb": 1.5, "machine": "this one"},
        "left over": {"seconds": 100.0, "peak_memory_gb": 9.0, "machine": "another"},
    }
    stages = [
        SimpleNamespace(name="ensemble", entries={"seeds/0": "", "seeds/1": ""}),
        SimpleNamespace(name="new", entries={"new": ""}),
    ]
    book = Book(SimpleNamespace(stages=stages, store=SimpleNamespace(provenance=provenances.get)))
    (stage,) = book.stages().to_dict("records")
    assert stage == {"name": "ensemble", "seconds": 5.0, "peak_memory_gb": 1.5, "machine": "this one"}


def test_the_scoreboard_shows_verdict_and_statistic_and_untested_claims_too():
    tested = line("a", 0.5, "supported") | {"claim": "it holds", "rule": "above it", "statistic": "share"}
    noise = tested | line("a", -0.2, "opposite") | {"line": "beyond size and noise"}
    board = page.scoreboard({"here": [tested, noise, ledger.not_tested("C9")]}).splitlines()
    assert board[2] == (
        "| {doc}`C2 <function>` | it holds | ✓ as stated: **supported**, 0.50 [0.40, 0.60]<br>"
        "✗ beyond size and noise: **opposite**, -0.20 [-0.30, -0.10] |"
    )
    assert board[3] == f"| {{doc}}`C9 <pooling>` | {ledger.CLAIMS['C9']} | – not tested |"
    there = [tested | line("a", 0.7, "supported"), ledger.not_tested("C9")]
    beside = page.scoreboard({"here": [tested], "there": there}).splitlines()
    assert beside[0] == "|  | claim or question | here | there |"
    assert beside[2].endswith("0.50 [0.40, 0.60] | ✓ as stated: **supported**, 0.70 [0.60, 0.80] |")
    assert beside[3].endswith("|  | – not tested |")  # what nobody asked here
    (untreated,) = page.scoreboard({"here": [ledger.not_tested("B5")]}).splitlines()[2:]
    assert untreated.startswith("| B5 |")
    assert untreated.endswith("| – not tested |")
    (answered,) = page.scoreboard({"here": [ledger.not_tested("B1")]}).splitlines()[2:]
    assert answered.startswith("| {doc}`B1 <costs>` |")
    assert answered.endswith("| – measured, on its page |")
    assert set(page.CHAPTERS) <= set(ledger.CLAIMS)
    assert set(page.CHAPTERS.values()) <= set(build.chapters())
    assert (
        page.rules([tested, ledger.not_tested("C9")]) == "**C2, as stated.** The statistic is the share; the verdict is above it."
    )


def test_a_verdict_that_its_number_does_not_explain_says_which_condition_decides():
    def board(verdict: str, *met: bool | None) -> str:
        first = line("a", 0.5, verdict) | {"claim": "it holds", "rule": "above it", "statistic": "share"}
        values = [0.5, 0.1, 0.2][: len(met)]
        parts = [
            line("a", value, "") | {"what": f"part {place}", "met": is_met}
            for place, (value, is_met) in enumerate(zip(values, met, strict=True))
        ]
        return page.scoreboard({"here": [first | {"conditions": parts}]}).splitlines()[-1]

    assert board("opposite", True, None, False).endswith("0.50 [0.40, 0.60]; by *part 2*, 0.20 [0.10, 0.30] |")
    assert board("inconclusive", True, None, None).endswith("0.50 [0.40, 0.60]; by *part 1*, 0.10 [0.00, 0.20] |")
    assert board("opposite", False, None, False).endswith("0.50 [0.40, 0.60] |")  # the number itself
    assert board("supported", True, True).endswith("0.50 [0.40, 0.60] |")


def judged_line(*intervals: Interval) -> dict:
    conditions = [ledger.Condition("a share", interval, 0.5, below=place == 1) for place, interval in enumerate(intervals)]
    return ledger.judged(ledger.Rule("C1", "share", "it lies above"), intervals[0], Interval(0.1, 0, 0.2), conditions) | {
        "cell": "a"
    }


def test_a_verdict_stands_with_its_conditions_met_failed_and_open():
    nothing = float("nan")
    text = page.judged([judged_line(Interval(0.7, 0.6, 0.8), Interval(0.7, 0.6, 0.8), Interval(0.6, nothing, nothing))])
    first, _, *table = text.splitlines()
    assert first == "**C1, as stated: opposite**, in this model, on this corpus."
    assert table[2:] == [
        "| a share | 0.700 [0.600, 0.800] | above 0.5 | met |",
        "| a share | 0.700 [0.600, 0.800] | below 0.5 | failed |",
        "| a share | 0.600 | above 0.5 | open |",
    ]


def test_a_claim_that_is_not_tested_says_so():
    assert page.judged([ledger.not_tested("C9")]) == "**C9 is not tested** in this study."


def test_code_in_a_table_is_no_markup():
    text = "nulls=_surrogate_ *a* `b` $c$ [d](e) a|b <i> \\* &amp;"
    table = MarkdownIt().enable("table").render(f"| x |\n| --- |\n| {page.code(text)} |")
    (shown,) = re.findall(r"<td><code>(.*)</code></td>", table)
    assert html.unescape(shown) == text
    assert html.unescape(page.code("a\nb")) == "<code>a↵b</code>"


def test_the_gallery_escapes_what_the_corpus_says_and_marks_what_fires():
    rows = {"band": "stable", "feature": 1, "rank": 1, "offset": [0, 1], "token": ["<script>", "\n"], "activation": [2.0, 0.0]}
    table = pd.DataFrame(rows).assign(stability=1.0, matches=3, trials=3, frequency=0.1)
    shown = page.gallery(table)
    assert re.search(r"<mark [^>]*>&lt;script&gt;</mark>↵</code>", shown)
    assert "<script>" not in shown
    assert "comes back in 3 of 3 other seeds and fires on 10.00% of the tokens" in shown


def test_seeds_are_not_named_where_something_else_tells_cells_apart():
    study = book_of({"variant": ["relu"], "seeds": [3]}).study
    assert list(told_apart(study.cells.values()).values()) == ["topk", "relu"]


def test_nothing_to_say_shows_nothing(capsys):
    page.say(" \n")
    assert capsys.readouterr().out == ""
    page.say("something")
    assert capsys.readouterr().out
