from types import SimpleNamespace

import pandas as pd

from sae_stability.book import derived
from sae_stability.book.tables import Book
from sae_stability.study import Study


def planted(grid: dict) -> Book:
    """A book of a study whose cells have two SAEs each."""
    keys = {"model": "docstrings-2l", "hook_name": "blocks.1.hook_resid_pre", "tokens": 1000, "batch": 100, "k": 4}
    study = Study(name="planted", d_sae=64, seeds=2, grid=grid, **keys)
    cells = pd.DataFrame([{"cell": id, "variant": cell.variant, "d_sae": cell.d_sae} for id, cell in study.cells.items()])
    saes = pd.DataFrame({"cell": [*study.cells] * 2, "loss_recovered": 0.9, "dead": 16, "training_seconds": 2.0})
    tables = {"cells": cells.assign(cell_on_target=cells["variant"] != "relu"), "saes": saes.assign(cell_on_target=True)}
    return Book(SimpleNamespace(study=study, store=SimpleNamespace(study=study, table=tables.get)))


def test_variants_are_compared_where_all_else_is_equal():
    groups = derived.variants_side_by_side(planted({"variant": ["topk", "relu"], "seeds": [3]}))
    assert [list(group["name"]) for group in groups] == [["topk", "relu †"]]  # not the main cell, which has other seeds
    assert list(groups[0]["dead_share"]) == [0.25, 0.25]


def test_each_width_has_its_own_comparison_of_variants():
    groups = derived.variants_side_by_side(planted({"variant": ["gated", "relu"], "d_sae": [32, 64]}))
    assert [list(group["d_sae"]) for group in groups] == [[64, 64, 64], [32, 32]]
    assert [list(group["name"]) for group in groups] == [["topk", "gated", "relu †"], ["gated", "relu †"]]


def test_a_study_of_one_variant_has_none_to_compare():
    assert derived.variants_side_by_side(planted({"d_sae": [32, 64]})) == []


def test_training_ends_where_the_last_tokens_are_read():
    curve = pd.DataFrame(
        [("real", 100, 0.5), ("real", 200, 0.7), ("real", 200, 0.8), ("surrogate", 100, 0.9), ("surrogate", 200, 0.6)],
        columns=["kind", "tokens", "explained_variance"],
    )
    ends = derived.training_ends(curve)
    assert ends.loc["real"].to_list() == [0.7, 0.8, 2]
    assert ends.loc["surrogate"].to_list() == [0.6, 0.6, 1]


def test_a_stage_counts_with_its_report():
    rows = [("a/quality", 2.0, 1.5), ("a/quality/report", 0.5, 1.0), ("a/stability/report", 1.0, 2.0)]
    stages = derived.with_reports(pd.DataFrame(rows, columns=["name", "seconds", "peak_memory_gb"]))
    assert stages.to_numpy().tolist() == [["a/quality", 2.5, 1.5], ["a/stability", 1.0, 2.0]]
