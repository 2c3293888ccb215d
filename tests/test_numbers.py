"""Numbers in prose lead to the row of the table that has them."""

import html
import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest

from sae_stability.book import numbers, page
from sae_stability.book.tables import Tables, placed
from sae_stability.loading import load_study

CELL = load_study("quick").main.id
TABLE = pd.DataFrame(
    {
        "cell": [CELL, CELL, CELL, "other"],
        "kind": ["real", "real", "surrogate", "real"],
        "weight": ["features", "energy", "features", "features"],
        "share": [0.4871, 0.25, np.nan, 0.4871],
        "share_low": [0.45, 0.2, np.nan, 0.1],
        "share_high": [0.5, np.nan, np.nan, 0.9],
        "seeds": [4, 4, 4, 5],
    }
)


class Kept(Tables):
    study = load_study("quick")
    place = "results/quick/tables"
    ledger = ()

    def _read(self, name: str) -> pd.DataFrame:
        return TABLE.copy()


def cited(link: str) -> dict:
    (found,) = re.findall(r'data-row="([^"]*)"', link)
    return json.loads(html.unescape(found))


def test_a_link_holds_the_row_and_prints_what_the_number_alone_would():
    rows = Kept().table("reappearing")
    by_place = rows.set_index(["kind", "weight"], drop=False)
    for row in (rows.iloc[0], by_place.loc[("real", "features")], rows.query("weight == 'features'").iloc[0]):
        link = numbers.linked(Kept(), row, "share", ".0%")
        assert re.sub("<[^>]*>", "", link) == page.interval(row, "share", ".0%") == "49% [45%, 50%]"
        where = {"cell": CELL, "kind": "real", "weight": "features"}
        table = "results/quick/tables/reappearing.parquet"
        assert cited(link) == {"table": table, "row": where, "column": "share", "values": [0.4871, 0.45, 0.5]}
    alone = numbers.linked(Kept(), rows.iloc[0], "seeds", ",")
    assert re.sub("<[^>]*>", "", alone) == "4"
    assert cited(alone)["values"] == [4]
    one_end = numbers.linked(Kept(), rows.iloc[1], "share", ".0%")
    assert re.sub("<[^>]*>", "", one_end) == "25%"
    assert numbers.linked(Kept(), rows.iloc[2], "share") == "not defined"  # which no digit of a table says better


def test_a_row_that_cannot_be_told_from_another_has_no_link():
    """Two sets of which nothing comes back, say, from whose rows an index has taken the names."""
    rows = Kept().table("reappearing").assign(share=0.0, share_low=np.nan, share_high=np.nan)
    study = Kept()
    study._read = lambda name: rows.copy()
    assert numbers.linked(study, rows.set_index(["kind", "weight"]).loc[("real", "energy")], "share", ".0%") == "0%"
    told = numbers.linked(study, rows.set_index(["kind", "weight"], drop=False).loc[("real", "energy")], "share", ".0%")
    assert cited(told)["row"] == {"cell": CELL, "kind": "real", "weight": "energy"}


def test_a_measurement_tells_a_row_apart_where_nothing_else_does():
    row = Kept().table("sharing").iloc[:1]
    several = pd.concat([row.assign(threshold=threshold) for threshold in (0.5, -0.5, np.nan)])
    several.attrs["table"] = "sharing"
    study = Kept()
    study._read = lambda name: several.copy()
    found = [cited(numbers.linked(study, several.iloc[position], "share", ".0%")) for position in range(3)]
    assert [each["row"] for each in found] == [{"cell": CELL, "threshold": threshold} for threshold in (0.5, -0.5, None)]
    assert len({numbers._anchor(each) for each in found}) == 3


def test_a_number_beside_a_verdict_leads_to_its_line_and_one_of_a_condition_to_the_condition():
    bound = {"what": "share of features, less chance", "value": 0.3, "ci_low": None, "ci_high": None, "bound": 0.1, "below": False}
    line = {"cell": CELL, "id": "C1", "line": "as stated", "value": 0.4871, "ci_low": 0.45, "ci_high": 0.5, "conditions": [bound]}
    plain = numbers.line_interval(line, ".2f")
    assert plain == "0.49 [0.45, 0.50]"
    (line,) = placed([line], "published/variants")
    link = numbers.line_interval(line, ".2f")
    assert re.sub("<[^>]*>", "", link) == plain
    row = {"cell": CELL, "id": "C1", "line": "as stated"}
    ledger = {"table": "published/variants/claims.json", "row": row, "column": "value", "values": [0.4871, 0.45, 0.5]}
    assert cited(link) == ledger
    of_condition = cited(numbers.line_interval(pd.DataFrame(line["conditions"]).iloc[0]))  # as tables of conditions print it
    assert of_condition == ledger | {"row": row | {"condition": bound["what"]}, "values": [0.3]}
    assert numbers.line_interval(line | {"value": None, "ci_low": None, "ci_high": None}) == "not defined"


def several() -> tuple[Kept, pd.DataFrame]:
    """A study whose cells have a number for each seed and kind."""
    rows = pd.DataFrame(
        {
            "cell": [CELL] * 6 + ["other"] * 3,
            "kind": ["real"] * 3 + ["surrogate"] * 3 + ["real"] * 3,
            "seed": [0, 1, 2] * 3,
            "share": [0.5, 0.25, 0.75, 0.1, 0.2, 0.0, 0.9, 0.8, 0.7],
        }
    )
    study = Kept()
    study._read = lambda name: rows.copy()
    return study, study.table("seeds")


def test_a_number_made_of_several_rows_says_of_which_and_how():
    study, rows = several()
    real = rows[rows["kind"] == "real"]
    table, where = "results/quick/tables/seeds.parquet", {"cell": CELL, "kind": "real"}
    mean = numbers.combined(study, real, "share", "mean", ".0%")
    assert re.sub("<[^>]*>", "", mean) == "50%"
    assert cited(mean) == {"table": table, "row": where, "column": "share", "how": "mean", "values": [0.5]}
    ways = {how: cited(numbers.combined(study, real, "share", how)) for how in numbers.COMBINED}
    assert {how: of["values"] for how, of in ways.items()} == {
        **{"mean": [0.5], "sum": [1.5], "range": [0.5]},
        **{"first less last": [-0.25], "last less first": [0.25]},
    }
    in_any_order = cited(numbers.combined(study, real.iloc[::-1], "share", "last less first"))
    assert in_any_order["values"] == [0.25]  # as whoever looks the rows up will find them
    assert len({numbers._anchor(each) for each in ways.values()}) == len(ways)
    two = cited(numbers.combined(study, real.iloc[[0, 2]], "share", "last less first"))
    assert two["row"] == {**where, "seed": [0, 2]}
    of_all = study.table("seeds", every_cell=True)
    assert cited(numbers.combined(study, of_all, "share", "mean"))["row"] == {}
    across = cited(numbers.combined(study, of_all[of_all["seed"] == 1], "share", "mean"))
    assert across["row"] == {"seed": 1}


def test_a_value_that_holds_a_comma_stands_in_quotes():
    cited = {"table": "t", "row": {"kind": "sparse, budget to spare", "seed": [0, 2]}, "column": "share", "values": [0.5]}
    assert "share in t: kind &quot;sparse, budget to spare&quot;, seed 0 and 2" in numbers._row(cited, "50%", "synthetic")


def test_rows_that_their_columns_do_not_tell_from_others_have_no_link():
    study, rows = several()
    corners = rows[(rows["kind"] == "real") == (rows["seed"] == 0)]  # by kind and seed any row
    assert numbers.combined(study, corners, "share", "mean") == f"{corners['share'].mean():.3f}"
    assert numbers.combined(study, rows.iloc[:0], "share", "mean") == "not defined"
    with pytest.raises(ValueError, match="no row of the table seeds of quick is like that"):
        numbers.combined(study, rows.assign(share=2 * rows["share"]), "share", "mean")


def test_a_row_that_no_table_has_is_refused():
    rows = Kept().table("reappearing")
    with pytest.raises(ValueError, match="a row of no table"):
        numbers.linked(Kept(), TABLE.iloc[0], "share")
    with pytest.raises(ValueError, match="no row of the table reappearing of quick is like that"):
        numbers.linked(Kept(), rows.assign(share=2 * rows["share"]).iloc[0], "share")
    with pytest.raises(ValueError, match="no row of the table"):
        numbers.linked(Kept(), rows.assign(twice=2 * rows["share"]).iloc[0], "twice")


def test_the_page_lists_each_number_once_under_the_chapter_that_has_it_first():
    rows = Kept().table("reappearing")
    links = [numbers.linked(Kept(), rows.iloc[position], "share", ".0%") for position in (0, 1, 0)]
    said = {"output_type": "display_data", "data": {"text/markdown": " and ".join(links)}, "metadata": {}}
    chapters = {}
    for name in ("stability", "function"):
        chapters[name] = nbformat.v4.new_notebook()
        title = nbformat.v4.new_markdown_cell(f"# Of {name}\n\nText.")
        chapters[name].cells = [title, nbformat.v4.new_code_cell("", outputs=[said])]
    text = numbers.page("# Numbers", chapters)
    assert text.count("<tr id=") == 2
    assert "## Of stability" in text
    assert "Of function" not in text
    (first, second) = re.findall(r'<tr id="([^"]*)">', text)
    assert all(f'href="numbers.html#{anchor}"' in "".join(links) for anchor in (first, second))
    where = f"share in results/<wbr>quick/<wbr>tables/<wbr>reappearing.parquet: cell {CELL}, kind real, weight features"
    told = ["0.4871", "0.45 to 0.5", where]
    assert "".join(f"<td>{cell}</td>" for cell in told) in text


def rounded(printed: str) -> tuple[float, float]:
    """A number as it is printed, and by how much rounding may have moved it."""
    sign, digits, percent = re.fullmatch(r"([+−-]?)([\d,]*\.?\d*)(%?)", printed).groups()
    places = len(digits.partition(".")[2]) + (2 if percent else 0)
    value = float(digits.replace(",", "")) / (100 if percent else 1)
    return (-value if sign in ("-", "−") else value), 0.5000001 * 10**-places


def chosen(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows that are told: by columns and their values, which stand in quotes where they hold commas."""
    if where == "every row":
        return table
    for each in re.split(r', (?=(?:[^"]*"[^"]*")*[^"]*$)', where):
        key, _, wanted = each.replace('"', "").partition(" ")
        texts = table[key].astype(object).where(table[key].notna(), None).astype(str)
        table = table[texts.isin([wanted, *wanted.split(" and ")])]
    return table


def in_ledger(ledger: list[dict], where: str) -> dict:
    """The line that is told, or its condition."""
    cell, claim, line, _, condition = re.fullmatch(
        r"cell (\S+), id (\S+), line ([^,]+)(, condition (.+))?", where.replace('"', "")
    ).groups()
    (found,) = (each for each in ledger if (each["cell"], each["id"], each["line"]) == (cell, claim, line))
    if condition is None:
        return found
    (part,) = (each for each in found["conditions"] if each["what"] == condition)
    return part


def test_every_number_that_pages_link_is_what_its_table_has(site, quick):
    """Read on the pages, and looked up in the tables and ledgers: a number that drifts from its row is found here."""
    from bs4 import BeautifulSoup

    pages = {path.stem: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.glob("*.html")}
    links = [(name, link) for name, each in pages.items() for link in each.select("article a.number")]
    assert len(links) > 150
    assert {"index", "setup", "stability", "function", "subspaces", "sharing", "activity", "real"} <= {name for name, _ in links}
    ways = set()
    for name, link in links:
        row = pages["numbers"].find(id=link["href"].partition("#")[2])
        assert row is not None, (name, link["href"])
        _, value, ends, stands = (part.get_text() for part in row.find_all("td"))
        how, column, folder, table, where = re.fullmatch(
            r"(?:(.+) of )?(\S+) in (\S+)/(\S+)\.(?:parquet|json): (.+)", stands
        ).groups()
        tables = quick if folder.startswith("results/quick") else page.published(folder.removeprefix("published/"))
        if table == "claims":
            held, low, high = in_ledger(tables.ledger, where), "ci_low", "ci_high"
        else:
            found, low, high = chosen(tables.table(table, every_cell=True), where), f"{column}_low", f"{column}_high"
            assert len(found) == 1 or (how and len(found)), (name, stands)
            (held,) = [{column: numbers.COMBINED[how](found[column])}] if how else found.to_dict("records")
        ways.add(how)
        values = [held[column], *((held[low], held[high]) if ends else ())]
        exact = [f"{each:,}" if isinstance(each, int) else f"{each:.6g}" for each in values]
        assert [value, *(ends.split(" to ") if ends else ())] == exact
        printed = re.findall(r"[+−-]?[\d,]*\.?\d+%?", link.get_text())
        for shown, whole in zip(printed, values, strict=True):
            number, reach = rounded(shown)
            assert abs(number - whole) <= reach, (name, link.get_text(), values)
    assert ways > {None, "mean"}
