"""Studies: what is read, what is refused, in one line."""

import json
from collections.abc import Sequence

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_stability import pipeline, places
from sae_stability.errors import UserError
from sae_stability.experiments.explanations import language_model
from sae_stability.experiments.texts import _slug
from sae_stability.explanations import LanguageModel, LocalModel
from sae_stability.loading import load_study
from sae_stability.study import Cell, Recipe, Study, model_name

BROKEN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**25),
    st.floats(allow_nan=True),
    st.text(max_size=20),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.sampled_from(["model", "k", "budget", "base_url", "x"]), st.integers(0, 3), max_size=2),
)
KEYS = [
    *Study.model_fields,
    "grid.k",
    "grid.variant",
    "grid.seeds",
    "explainer.model",
    "explainer.base_url",
    "explainer.key",
    "x.y",
]


def study_or_complaint(name: str = "quick", overrides: Sequence[str] = ()) -> Study | str:
    try:
        return load_study(name, overrides)
    except UserError as error:
        return str(error)


@given(st.dictionaries(st.sampled_from(KEYS), BROKEN, min_size=1, max_size=4))
@settings(max_examples=300)
def test_whatever_stands_in_a_study_it_is_one_or_is_refused_in_one_line(values):
    overrides = [f"{key}={json.dumps(value, allow_nan=True)}" for key, value in values.items()]
    study = study_or_complaint(overrides=overrides)
    if isinstance(study, Study):
        assert len({cell.id for cell in study.cells.values()}) == len(study.cells)
        assert len(study.main.seed_list) >= 2
    else:
        assert "\n" not in study
        assert len(study) < 700


@given(st.text(max_size=300))
@settings(max_examples=200)
def test_whatever_stands_in_a_file_it_is_a_study_or_is_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    study = study_or_complaint(str(path))
    assert isinstance(study, Study) or "\n" not in study


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("explainer.base_url=http://localhost", "explainer.model: missing; add 'explainer.model: as the endpoint calls it;"),
        ("seeds=1000000000000", "seeds:"),
        ("seeds=[99999999999]", "seeds"),
        ("d_sae=99999999999999999999999", "d_sae:"),
        ("tokens=1e30", "tokens:"),
        ("nulls=[surrogate,noise]", "nulls"),
        ("name=../x", "name:"),
    ],
)
def test_what_is_missing_or_too_large_is_named(override, said):
    with pytest.raises(UserError) as refused:
        load_study("quick", [override])
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("url", "key", "fits"),
    [
        ("https://api.example.com/v1", "OPENAI_API_KEY", True),
        ("http://localhost:8000/v1", "LOCAL_API_KEY", True),
        ("http://127.0.0.1:8000", "API_KEY", True),
        ("http://[::1]:8000", "API_KEY", True),
        ("HTTPS://Host", "API_KEY", True),
        ("http://[::1", "API_KEY", False),
        ("https://", "API_KEY", False),
        ("http://example.com/v1", "OPENAI_API_KEY", False),
        ("http://localhost.example.com", "OPENAI_API_KEY", False),
        ("https://api.example.com/v1", "AWS_SECRET_ACCESS_KEY", False),
        ("https://api.example.com/v1", "HOME", False),
    ],
)
def test_a_study_of_somebody_else_names_no_secret_and_sends_none_in_the_clear(url, key, fits):
    overrides = [f"explainer.base_url={url}", "explainer.model=m", "explainer.budget=10", f"explainer.key={key}"]
    if fits:
        assert load_study("quick", overrides).explainer.key == key
    else:
        with pytest.raises(UserError, match=r"explainer\.(key|base_url)"):
            load_study("quick", overrides)


def test_names_of_what_is_shipped_mean_it_in_every_working_directory(tmp_path, monkeypatch):
    for name in ("docstrings-2l", "docstrings", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    study = load_study("quick")
    assert (study.model, study.corpus) == ("docstrings-2l", "docstrings")
    assert load_study("quick", ["model=mine"]).model == str(tmp_path / "mine")


def test_a_chat_model_in_a_folder_is_that_folder_and_what_an_endpoint_calls_it_stays(tmp_path, monkeypatch):
    (tmp_path / "chat").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_study("quick", ["explainer.model=chat"]).explainer.model == str(tmp_path / "chat")
    endpoint = ["explainer.model=chat", "explainer.base_url=http://localhost", "explainer.budget=10"]
    assert load_study("quick", endpoint).explainer.model == "chat"


def test_values_that_look_alike_in_a_folder_name_are_cells_of_their_own():
    study = load_study("quick", ["grid={model: ['a/b', 'a_b', 'a b', 'a/b']}"])
    assert [cell.model for cell in study.cells.values()] == ["docstrings-2l", "a/b", "a_b", "a b"]
    assert len(set(study.cells)) == 4


def test_a_cell_is_known_by_what_is_asked_and_a_recipe_by_what_is_trained():
    study = load_study("quick", ["grid={threshold: [0.6, 0.8], seeds: [3]}"])
    ids, recipes = {cell.id for cell in study.cells.values()}, {cell.recipe for cell in study.cells.values()}
    assert len(ids) == 3
    assert len(recipes) == 1
    counted, listed = (Cell(**{**study.main.model_dump(), "seeds": seeds}) for seeds in (3, [0, 1, 2]))
    assert counted.id == listed.id
    assert set(Recipe.model_fields) < set(Cell.model_fields)


def test_names_tell_cells_apart_by_what_varies():
    names = load_study("quick", ["grid={variant: [relu, topk], d_sae: [128, 256]}"]).names
    assert list(names.values()) == ["topk, d_sae=256", "relu, d_sae=128", "relu, d_sae=256", "topk, d_sae=128"]
    assert list(load_study("quick", ["grid={seeds: [3]}"]).names.values()) == ["seeds=4", "seeds=3"]
    assert list(load_study("quick", ["grid={}"]).names.values()) == ["topk"]
    assert len(set(load_study("quick").names.values())) == len(load_study("quick").cells)


def test_every_study_in_the_folder_can_be_read():
    from sae_stability import places

    for path in sorted((places.root() / "studies").glob("*.yaml")):
        study = load_study(path.stem)
        assert study.name == path.stem
        assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_a_key_that_stands_twice_and_numbers_that_are_no_decimals_are_said(tmp_path):
    quick = (places.root() / "studies" / "quick.yaml").read_text(encoding="utf-8")
    path = tmp_path / "study.yaml"
    path.write_text(quick + "\nk: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match="k stands twice"):
        load_study(str(path))
    path.write_text(quick.replace("k: 8", "k: 1:30"), encoding="utf-8")
    with pytest.raises(UserError, match="k: '1:30' does not fit"):
        load_study(str(path))
    path.write_text("\ufeff" + quick.replace("k: 8", "k: 010"), encoding="utf-8")
    assert load_study(str(path)).k == 10  # and not 8
    assert load_study("quick", ["tokens=200_000"]).tokens == 200_000


def test_paths_beside_a_study_are_found_and_options_stay(tmp_path, monkeypatch):
    (tmp_path / "course" / "texts").mkdir(parents=True)
    quick = (places.root() / "studies" / "quick.yaml").read_text(encoding="utf-8")
    study = tmp_path / "course" / "study.yaml"
    study.write_text(quick.replace("corpus: docstrings", "corpus: texts?column=body"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_study("course/study.yaml").corpus == f"{tmp_path / 'course' / 'texts'}?column=body"
    (tmp_path / "texts").mkdir()  # the working directory comes first
    assert load_study("course/study.yaml").corpus == f"{tmp_path / 'texts'}?column=body"


@pytest.mark.parametrize(
    ("model", "called"),
    [
        ("docstrings-2l", "docstrings-2l"),
        ("EleutherAI/pythia-70m", "pythia-70m"),
        ("/home/me/my model", "my model"),
        ("/cache/models--openai-community--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("/my/snapshots/gpt2", "gpt2"),
    ],
)
def test_a_snapshot_in_the_hubs_cache_is_called_by_its_model(model, called):
    assert model_name(model) == called


def test_an_endpoint_needs_a_budget_and_a_model_on_this_machine_none(tmp_path):
    with pytest.raises(UserError, match="budget: missing; give the tokens that the endpoint may use"):
        load_study("quick", ["explainer.base_url=https://host/v1", "explainer.model=m"])
    paid = load_study("quick", ["explainer.base_url=https://host/v1", "explainer.model=m", "explainer.budget=10"])
    free = load_study("quick", ["explainer.model=smollm2-135m"])
    assert isinstance(language_model(paid, tmp_path), LanguageModel)
    engine = language_model(free, tmp_path)
    assert isinstance(engine, LocalModel)
    assert engine.name == "smollm2-135m (on this machine)"


@pytest.mark.parametrize(("name", "architecture"), [("gpt2", "gpt2"), ("pythia-160m", "neox"), ("gemma-2-2b", "gemma2")])
def test_studies_for_the_hub_take_models_of_their_architecture(model_folders, small, house, name, architecture):
    study = load_study(name)
    assert (study.device, study.stream) == ("cuda", True)
    assert study.notes.startswith("Not run yet.")
    pipeline.check(load_study(name, [*small, f"model={model_folders[architecture]}", "device=cpu"]))


def test_a_file_may_have_a_question_mark_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "why?.txt").write_text("one", encoding="utf-8")
    assert load_study("quick", ["corpus=why?.txt"]).corpus == str(tmp_path / "why?.txt")


def test_a_shipped_model_is_one_however_it_is_named(tmp_path, monkeypatch):
    folder = places.model("docstrings-2l")
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    for named in (str(folder), "./docstrings-2l", str(tmp_path / "link")):
        assert load_study("quick", [f"model={named}"]).main == load_study("quick").main
    assert len(load_study("quick", [f"grid={{model: [docstrings-2l, {folder}]}}"]).cells) == 1


@pytest.mark.parametrize("grid", ["grid={k: [4, 8]}", "grid.k=[4, 8]"])
def test_what_is_set_means_the_same_in_any_order(grid):
    for overrides in (["k=16", grid], [grid, "k=16"]):  # of the main cell, and of the others
        assert {cell.k for cell in load_study("quick", overrides).cells.values()} == {16, 4, 8}
    assert {cell.d_sae for cell in load_study("quick", ["k=4", "grid.d_sae=[128, 256]"]).cells.values()} == {128, 256}


def test_names_in_folders_fit_a_file_system_in_every_script():
    assert len(_slug("文" * 200, "é" * 200).encode()) <= 81
    assert _slug("models/" + "a" * 100, "b c") == "a" * 40 + "-b_c"
