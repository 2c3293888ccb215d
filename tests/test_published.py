"""Published studies are read as if they had been computed here."""

import shutil

import pandas as pd
import pytest

from sae_stability import places
from sae_stability.book import page, tables
from sae_stability.files import read_json


@pytest.fixture
def elsewhere(quick, tmp_path, monkeypatch):
    """A checkout in which the quick study is published as the one of variants."""
    folder = tmp_path / "published" / tables.VARIANTS
    shutil.copytree(quick.folder / "tables", folder)
    shutil.copy(quick.folder / "claims.json", folder)
    monkeypatch.setattr(places, "root", lambda: tmp_path)
    return page.published(tables.VARIANTS)


def test_a_published_study_has_the_tables_and_the_verdicts_of_its_run(quick, elsewhere):
    assert elsewhere.study == quick.study
    pd.testing.assert_frame_equal(elsewhere.table("cells"), quick.table("cells"))
    pd.testing.assert_frame_equal(elsewhere.others(), quick.others())
    assert elsewhere.ledger == quick.ledger
    assert page.by_line(elsewhere, ["C1"]) == page.by_line(quick, ["C1"])
    commit = read_json(quick.folder / "tables" / "provenance.json")["commit"]
    assert page.short(commit) in elsewhere.origin
    assert elsewhere.table("none at all").empty
    assert page.published("none at all") is None


def test_published_variants_stand_in_for_a_grid_of_the_same_cell_only(quick, elsewhere):
    assert quick.compared is quick  # it has a grid of its own
    (alone, other) = (
        tables.Book(type(quick.plan)(quick.study.model_copy(update={"grid": {}, **changed}))) for changed in ({}, {"k": 9})
    )
    assert alone.compared.origin == elsewhere.origin
    assert other.compared is other
