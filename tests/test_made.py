"""How figures were made: what is kept with them, and what readers get of it."""

import base64
import importlib
import inspect
import pkgutil
import re

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sae_stability import figures
from sae_stability.book import made
from sae_stability.figures.record import record_of, recorded
from sae_stability.figures.style import new_axes
from sae_stability.statistics import Interval

PIXEL = base64.b64encode(b"a picture").decode()


@recorded
def drawn(table: pd.DataFrame, by_kind: dict[str, pd.DataFrame], shares: pd.Series, title: str = "title") -> Figure:
    figure, (axis,) = new_axes(title)
    axis.plot(table["x"], table["y"])
    return figure


TABLE = pd.DataFrame({"x": [1, 2, 3], "y": [0.1, 0.25, None], "name": ["a", None, "<c>"], "ends": [Interval(1, 0, 2)] * 3})
SHARES = pd.Series([0.5, 0.5], index=pd.Index(["one", "other"], name="kind"), name="share")


def figure() -> Figure:
    return drawn(TABLE, {"real/all": TABLE[["x"]], "null": TABLE[["y"]]}, SHARES)


def test_every_figure_is_recorded():
    for module in pkgutil.iter_modules(figures.__path__):
        names = vars(importlib.import_module(f"{figures.__name__}.{module.name}"))
        for name, value in names.items():
            if inspect.isfunction(value) and inspect.signature(value).return_annotation is Figure:
                assert hasattr(value, "__wrapped__"), f"{module.name}.{name}"


def test_a_record_names_the_function_and_holds_its_tables():
    record = record_of(figure())
    assert record.function == f"{__name__}.drawn"
    assert list(record.tables) == ["table", "by_kind-real/all", "by_kind-null", "shares"]
    pd.testing.assert_frame_equal(record.tables["table"], TABLE)
    assert record.tables["shares"].to_dict("list") == {"kind": ["one", "other"], "share": [0.5, 0.5]}
    wide = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("mean", "low"), ("mean", "")]))
    assert list(record_of(drawn(TABLE, {"wide": wide}, SHARES)).tables["by_kind-wide"].columns) == ["mean low", "mean"]
    with pytest.raises(KeyError):
        record_of(new_axes("title")[0])


def test_rows_that_are_looked_up_by_columns_which_they_keep_stand_in_the_data_as_they_are():
    by_kind = TABLE.assign(kind=[f"kind {row}" for row in range(len(TABLE))]).set_index("kind", drop=False)
    pd.testing.assert_frame_equal(record_of(drawn(by_kind, {}, SHARES)).tables["table"], by_kind.reset_index(drop=True))


def test_the_same_figure_is_kept_in_the_same_bytes(monkeypatch):
    assert made.kept(figure(), "name") == made.kept(figure(), "name")
    monkeypatch.setattr(made, "LARGEST", 10)
    assert made.kept(figure(), "name")["svg"] is None


def test_a_fold_below_a_figure_links_to_its_data(tmp_path):
    shows, says = nbformat.v4.new_code_cell("page.show()"), nbformat.v4.new_code_cell("page.say()")
    shows.outputs = [
        nbformat.v4.new_output("display_data", {"image/png": PIXEL}),
        nbformat.v4.new_output("display_data", {made.KEPT: made.kept(figure(), "fig")}),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), shows, says])
    told = made.told(notebook, tmp_path, "quick", "abc123")
    nbformat.validate(told)
    assert [cell.cell_type for cell in told.cells] == ["markdown", "code", "markdown", "code"]
    assert [list(output.data) for output in told.cells[1].outputs] == [["image/png"]]
    fold, folder = told.cells[2].source, tmp_path / made.FOLDER
    assert f"<code>{__name__}.drawn</code>" in fold
    assert "study <code>quick</code> at commit <code>abc123</code>" in fold
    assert "(3 rows: " in fold
    files = {path.name for path in folder.iterdir()}
    assert len(files) == 2 + 4 * 2
    assert {re.sub("-[0-9a-f]{8}", "", file) for file in files} == {"fig.png", "fig.svg"} | {
        f"{table}.{end}" for table in ("table", "by_kind-real-all", "by_kind-null", "shares") for end in ("csv", "parquet")
    }
    assert all(f'href="{made.FOLDER}/{file}"' in fold for file in files)
    assert (folder / "fig.png").read_bytes() == b"a picture"
    assert "<svg" in (folder / "fig.svg").read_text(encoding="utf-8")
    of_table = next(file.stem for file in folder.glob("table-*.csv"))
    for read in (pd.read_csv(folder / f"{of_table}.csv"), pd.read_parquet(folder / f"{of_table}.parquet")):
        pd.testing.assert_frame_equal(read[["x", "y"]], TABLE[["x", "y"]])
        assert read["ends"].iloc[0] == f"{Interval(1, 0, 2)}"
        assert read["name"].fillna("").tolist() == ["a", "", "<c>"]
