"""Published studies are read as if they had been computed here."""

import shutil

import nbformat
import pandas as pd
import pytest

from sae_stability import places
from sae_stability.book import derived, numbers, page, tables
from sae_stability.experiments import asked
from sae_stability.figures import style
from sae_stability.files import read_json
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan

CHAPTERS, SHIPPED = places.root() / "book", places.published()


def executed(name: str, monkeypatch, **names) -> str:
    """All that the code cells of a chapter say, numbers without their links, and the alt texts of what they show, for the quick
    study."""
    said: list[str] = []

    def show(figure, name, alt, caption):
        assert not numbers.LINK.search(alt + caption)  # which are no HTML
        said.append(alt)

    monkeypatch.setattr(page, "say", lambda text: said.append(unlinked(text)))
    monkeypatch.setattr(page, "show", show)
    cells = nbformat.read(CHAPTERS / f"{name}.ipynb", as_version=4).cells
    namespace = dict(names)
    for cell in cells:
        if cell.cell_type == "code":
            exec(cell.source + ("\nstudy = 'quick'" if "parameters" in cell.metadata.tags else ""), namespace)
    return "\n".join(said)


def unlinked(text: str) -> str:
    return numbers.LINK.sub(r"\2", text)


@pytest.fixture
def elsewhere(quick, tmp_path, monkeypatch):
    """A checkout in which the quick study is published as the one of variants."""
    folder = tmp_path / "published" / tables.VARIANTS
    shutil.copytree(quick.folder / "tables", folder)
    shutil.copy(quick.folder / "claims.json", folder)
    monkeypatch.setattr(places, "published", lambda: tmp_path / "published")
    return page.published(tables.VARIANTS)


def test_a_published_study_has_the_tables_and_the_verdicts_of_its_run(quick, elsewhere):
    assert elsewhere.study == quick.study
    pd.testing.assert_frame_equal(elsewhere.table("cells"), quick.table("cells"))
    pd.testing.assert_frame_equal(elsewhere.others(), quick.others())
    assert read_json(elsewhere.folder / "claims.json") == read_json(quick.folder / "claims.json")
    assert page.by_line(elsewhere, ["C1"]) != page.by_line(quick, ["C1"])  # numbers lead to where each stands
    assert unlinked(page.by_line(elsewhere, ["C1"])) == unlinked(page.by_line(quick, ["C1"]))
    commit = read_json(quick.folder / "tables" / "provenance.json")["commit"]
    assert page.short(commit) in elsewhere.origin
    assert elsewhere.table("none at all").empty
    assert page.published("none at all") is None


def test_published_variants_stand_in_for_a_grid_of_the_same_cell_only(quick, elsewhere):
    assert quick.compared is quick  # it has a grid of its own
    alone, other = (tables.Book(Plan(load_study("quick", ["grid={}", *changed]))) for changed in ((), ("k=9",)))
    assert alone.compared.origin == elsewhere.origin
    assert other.compared is other


def test_published_draws_stand_in_for_further_nulls(quick, elsewhere, tmp_path):
    assert quick.beside_nulls is quick  # there are none
    shutil.copytree(elsewhere.folder, tmp_path / "published" / tables.DRAWS)
    assert quick.beside_nulls.folder == tmp_path / "published" / tables.DRAWS
    own = tables.Book(Plan(load_study("quick", ["nulls=[surrogate,whitened]"])))
    assert own.beside_nulls is own


def test_chapters_tell_published_studies(quick, elsewhere, tmp_path, monkeypatch):
    """Pages that read nothing else: what is longer and wider, what nobody had seen, and what is asked of many seeds."""
    for name in ("lengths", "widths", "unseen", "many-seeds", "smollm2", "smollm2-wikipedia"):
        shutil.copytree(elsewhere.folder, tmp_path / "published" / name)
    shutil.copytree(SHIPPED / "intervals", tmp_path / "published" / "intervals")
    folder = type(quick.main).folder
    with monkeypatch.context() as patch:
        (tmp_path / "masked").mkdir()
        asked.compute(quick.main, tmp_path / "masked")
        patch.setattr(type(quick.main), "folder", lambda self, name: tmp_path / "masked" if name == "asked" else folder(self, name))
        asked.asked(quick.main).assign(cell=quick.cell.id).to_parquet(tmp_path / "published" / "many-seeds" / "asked.parquet")
    told = executed("scale", monkeypatch)
    assert "not been run" not in told
    assert told.count("published with the book") == 2
    told = executed("across", monkeypatch)
    assert "Beyond its bound in every cell" in told
    assert "**C10 is not tested**" in told
    assert f"of one model, `{quick.model}`" in told
    told = executed("real", monkeypatch)
    assert "not been run" not in told
    tested = [line for line in quick.lines if line["id"] in {of["id"] for of in quick.lines if of["verdict"] != "not tested"}]
    assert unlinked(page.scoreboard({f"{quick.model}, study `quick`": tested})) in told
    assert f"On prose {quick.row['mean_stability']:.0%} [" in told
    assert unlinked(page.scoreboard({"prose": tested})) in told
    grown = quick.table("growth").query("kind == 'real'").set_index("tokens")["mean_stability"]
    half = min(grown.index, key=lambda tokens: abs(tokens - grown.index.max() / 2))
    assert f"From {half:,} to {grown.index.max():,} tokens mean stability moves by {grown.iloc[-1] - grown[half]:+.2f}" in told
    told = executed("own", monkeypatch)
    assert told.count(f"| {quick.row['d_sae']:,} | {quick.row['k']} |") >= 1
    told = executed("rules", monkeypatch)
    assert "not been judged" not in told
    assert derived.verdicts_by_claim(elsewhere.ledger) in told
    assert "1,000 simulated studies" in told
    assert all(line["verdict"] in told for line in quick.lines if line["id"] == "C1")
    shutil.copytree(SHIPPED / "worlds", tmp_path / "published" / "worlds")
    told = executed("synthetic", monkeypatch)
    assert "make worlds" not in told  # what makes the slices that are not there
    assert "Rare features, read longest" in told
    assert "start from the truth less random start" in told
    assert "spanned by 8" in told  # the reverse test
    assert "has not been run" in executed("pooling", monkeypatch)
    for name in ("pooling", "pools-of-4", "pools-of-8"):
        shutil.copytree(SHIPPED / name, tmp_path / "published" / name)
    told = executed("pooling", monkeypatch)
    assert "has not been run" not in told
    assert "These verdicts are of the study `pooling`" in told
    assert all(f"**Pools of {size} seeds.**" in told for size in (4, 8))
    assert "C9 in the study `pooling`" in told  # fresh seeds
    assert "a union finds +" in told
    shutil.copytree(SHIPPED / "draws", tmp_path / "published" / "draws")
    told = executed("subspaces", monkeypatch)
    assert all(line["verdict"] in told for line in quick.lines if line["id"] == "C7")
    assert "C7 in the study `quick`" in told
    draws = page.published("draws")
    met = sum(draws.claim("C7", cell, "beyond size and noise")["conditions"][1]["met"] is True for cell in draws.study.cells)
    (row,) = (row for row in told.splitlines() if "| less that of random directions of equal energy |" in row and " of 8 |" in row)
    assert f"| {met} of 8 |" in row
    assert "Dot chart of three differences in each of 8 draws" in told
    assert "model with shuffled weights, most alike" in told
    assert "whitened activations, groups" in told
    shared = draws.table("subspaces").query("quantity == 'share of ceiling' and coordinates == 'written' and rank == 16")
    shared = shared.set_index(["kind", "of"])["value"]
    for kind in ("surrogate", "randomised", "token-conditional"):
        assert f"*{style.KINDS[kind].name}* (by {shared['real', 'unstable'] - shared[kind, 'alike']:+.2f} [" in told
    told = executed("stability", monkeypatch)
    back = derived.share_back_everywhere(derived.one_a_feature(draws.table("counts")))
    assert all(f"{style.KINDS[kind].name} {back[kind]:.0%}" in told for kind in draws.cell.kinds)
    assert told.count("Mean stability there is") == 3
    means = draws.table("cells", every_cell=True)["mean_stability"]
    assert f"between\n{means.min():.3f} [" in told
    assert f"hold the mean of all, {means.mean():.3f}" in told
    told = executed("asked", monkeypatch)
    assert "reported by readers of the paper, not checked by us" in told
    assert "0.18 %" in told


def test_the_chapter_on_pools_tells_those_of_the_study_itself(monkeypatch):
    """The quick study has too few seeds for pools, and the default one has them; a published one stands in for it."""
    study = page.published("pooling")
    monkeypatch.setattr(page, "open_study", lambda name: study)
    told = executed("pooling", monkeypatch)
    pooled = study.table("pools").set_index("product")
    assert f"{pooled.loc['means, fine-tuned', 'share']:.2f} come back" in told
    assert "**Other readings of the same.**" in told
    assert "have no feature in it that reaches the threshold" in told
    assert all(line["verdict"] in told for line in study.claims("C9"))


def test_chapters_say_what_is_not_published(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "published", lambda: tmp_path)
    shutil.copytree(SHIPPED / "intervals", tmp_path / "intervals")
    assert "sae-stability run lengths" in executed("scale", monkeypatch)
    assert "sae-stability run smollm2" in executed("real", monkeypatch)
    assert "sae-stability run unseen" in executed("rules", monkeypatch)
    assert "sae-stability run many-seeds" in executed("asked", monkeypatch)
    assert "sae-stability run draws" in executed("subspaces", monkeypatch)
    assert "no null but the surrogate" in executed("stability", monkeypatch)
    assert executed("synthetic", monkeypatch).count("`make worlds` makes them") == 2  # slices of the diagram, and the reverse test


@pytest.mark.parametrize(("table", "key"), [("removals", ["measure", "reading", "set", "of"]), ("reappearing", ["weight"])])
def test_what_a_gpu_found_of_a_recipe_is_what_a_cpu_found(table, key):
    """`widths` was computed on a GPU and `lengths` on a CPU; their main cells are one recipe."""
    studies = [page.published(name) for name in ("lengths", "widths")]
    recipes = [study.study.main for study in studies]
    assert recipes[0] == recipes[1]
    assert ["GPU" in study.origin for study in studies] == [False, True]
    of_main = [study.table(table) for study in studies]
    both = of_main[0].merge(of_main[1], on=["kind", *key], suffixes=("", "_gpu"), validate="one_to_one")
    assert len(both) == len(of_main[0]) == len(of_main[1])
    known = both.dropna(subset=["share_low", "share_low_gpu"])
    overlap = (known["share_low"] <= known["share_high_gpu"]) & (known["share_low_gpu"] <= known["share_high"])
    assert overlap.mean() > 0.95
    assert len(known) > 0.9 * len(both)
