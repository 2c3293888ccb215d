"""Keys follow the code that a result's function reaches: edits of a copy of the package, and what they would compute again."""

import shutil
from pathlib import Path

import pytest
import torch

from sae_stability import keys
from sae_stability.experiments import ensembles, texts
from sae_stability.files import fingerprint
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan
from sae_stability.saes import FASTEST, fastest_dtype


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the package that keys read in place of the package."""
    source = tmp_path / "sae_stability"
    shutil.copytree(keys.SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "SOURCE", source)
    keys.forget()
    yield source
    monkeypatch.undo()
    keys.forget()


def planned(*overrides: str) -> dict[str, set[str]]:
    """The keys of each stage of a small study with a grid of variants, by a name that an edit does not change."""
    study = load_study("quick", ["grid={variant: [jumprelu]}", *overrides])
    names = {cell.id: cell.variant for cell in study.cells.values()}
    plan: dict[str, set[str]] = {}
    for stage in Plan(study).stages:
        first, _, rest = stage.name.partition("/")
        name = f"{names[first]}/{rest}" if first in names else stage.name
        if "-" in name and name.startswith("shared"):
            name = name.rpartition("-")[0]  # the rest is the key
        elif name.startswith("activations"):
            name = name.rpartition("/")[0]
        plan.setdefault(name, set()).update(stage.entries.values())
    return plan


@pytest.fixture(scope="module")
def before() -> dict[str, set[str]]:
    """The plan of the package as it is: what a copy of it has before an edit."""
    keys.forget()
    return planned()


def changed(before: dict[str, set[str]], after: dict[str, set[str]]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if before[name] != after[name]}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")
    keys.forget()


TRAINED = {f"shared/ensembles/{variant}-256-{kind}" for variant in ("topk", "jumprelu") for kind in ("real", "surrogate")}


def every(*experiments: str) -> set[str]:
    """Stages of some experiments in both cells."""
    return {f"{variant}/{name}" for variant in ("topk", "jumprelu") for name in experiments}


def test_a_docstring_or_a_comment_anywhere_computes_nothing(copy, before):
    for file in copy.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"""', '"""Edited. ', 1).replace("\n\n\n", "\n\n\n# a comment\n"), encoding="utf-8")
    keys.forget()
    assert changed(before, planned()) == set()


def test_choosing_which_features_are_explained_computes_explanations_and_what_stands_behind(copy, before):
    edit(copy / "experiments" / "explanations.py", "EXPLAINED_SEEDS, EXPLAINED = 4, 15", "EXPLAINED_SEEDS, EXPLAINED = 4, 16")
    assert changed(before, planned()) == {"topk/explanations", "topk/explanations/report", "tables", "claims.json"}


def test_how_effects_are_opened_computes_what_reads_them(copy, before):
    edit(copy / "experiments" / "function.py", "matching.opened(matched, threshold)", "matching.opened(matched, 0.5)")
    assert changed(before, planned()) == {
        *every("function/report"),
        "tables",
        "claims.json",
    }


def test_how_stability_is_opened_computes_everything_that_knows_bands(copy, before):
    edit(copy / "experiments" / "matching.py", ".any(1), threshold)", ".any(1), 0.5)")
    moved = changed(before, planned())
    assert every("function", "function/report", "stability/report", "triggers/report") <= moved
    assert {"topk/explanations", "topk/examples/report", "tables", "claims.json"} <= moved
    assert not moved & {*TRAINED, *every("quality", "triggers", "matching", "families", "frontier")}


def test_a_rule_computes_reports_of_its_experiment_only(copy, before):
    edit(copy / "experiments" / "stability.py", "RELIABLE = 0.7", "RELIABLE = 0.8")
    assert changed(before, planned()) == {*every("stability/report"), "tables", "claims.json"}


def test_a_variant_that_is_looked_up_by_name_computes_its_own_cells_only(copy, before):
    edit(copy / "saes" / "jumprelu.py", "BANDWIDTH = 0.05", "BANDWIDTH = 0.06")
    moved = changed(before, planned())
    assert {"shared/ensembles/jumprelu-256-real", "shared/ensembles/jumprelu-256-surrogate"} <= moved
    assert {name for name in moved if name.startswith(("topk", "shared/ensembles/topk"))} == set()


def test_a_null_source_computes_its_own_ensembles_only(copy):
    nulls = "nulls=[surrogate,whitened]"
    before = planned(nulls)
    edit(copy / "sources.py", "SMALLEST_VARIANCE = 1e-6", "SMALLEST_VARIANCE = 1e-5")
    moved = {name for name in changed(before, planned(nulls)) if name.startswith("shared")}
    assert moved == {
        "shared/activations/docstrings-2l-docstrings-blocks.1.hook_resid_pre-whitened",
        "shared/ensembles/topk-256-whitened",
        "shared/ensembles/jumprelu-256-whitened",
    }


def test_a_kernel_that_only_a_method_names_computes_everything_that_encodes(copy, before):
    edit(copy / "saes" / "compiled.py", "total = np.float32(0)", "total = np.float32(-0.0)")
    moved = changed(before, planned())
    assert moved >= {*TRAINED, *every("quality", "matching", "triggers", "function")}
    assert not {name for name in moved if name.startswith(("shared/texts", "activations"))}


def test_what_figures_and_pages_say_computes_nothing(copy, before):
    edit(copy / "figures" / "style.py", "WIDTH = 5.6", "WIDTH = 5.7")
    edit(copy / "book" / "page.py", '"✓<✗~±–"', '"✔<✗~±–"')
    edit(copy / "cli.py", "The command line", "The commands")
    assert changed(before, planned()) == set()


def test_what_trains_on_data_of_its_own_is_shared_and_knows_the_schemas_defaults(copy, before):
    synthetic = {"topk/synthetic", "topk/synthetic/report"}
    assert synthetic <= changed(before, planned("world_tokens=1000"))
    assert not synthetic & changed(before, planned("seeds=5", "threshold=0.6"))
    edit(copy / "synthetic.py", '"rate": 1e-2', '"rate": 2e-2')
    assert synthetic <= changed(before, planned())


def test_what_is_asked_trains_nothing(before):
    after = planned("threshold=0.6")
    behind = {"function", "function/report", "stability/report", "families", "families/report", "triggers/report"}
    behind |= {"activity", "activity/report", "impacts", "impacts/report", "sharing/report"}
    behind |= {"subspaces", "subspaces/report"}
    only_main = {"topk/explanations", "topk/explanations/report", "topk/examples/report"}  # contexts know no threshold
    translated = {"topk/translation", "topk/translation/report"}
    assert changed(before, after) == {*every(*behind), *only_main, *translated, "tables", "claims.json"}
    assert changed(before, planned("notes=other")) == set()
    assert changed(before, planned("ablation_tokens=900")) >= every("function")
    assert not changed(before, planned("ablation_tokens=900")) & {*TRAINED, *every("quality", "matching", "stability/report")}


def test_a_new_variant_null_or_key_of_the_schema_and_how_results_are_stored_compute_nothing(copy, before):
    edit(copy / "study.py", '"batchtopk", "matryoshka"]', '"batchtopk", "matryoshka", "seventh"]')
    edit(copy / "study.py", 'Nulls = Literal["surrogate"', 'Nulls = Literal["noise", "surrogate"')
    edit(copy / "study.py", "    fixed_order: bool", "    novel: bool = False\n    fixed_order: bool")
    edit(copy / "store.py", "was altered since it was computed", "has changed")
    edit(copy / "keys.py", "PACKAGE =", "OTHER = 1\nPACKAGE =")
    assert changed(before, planned()) == set()


@pytest.mark.parametrize("override", ["device=cuda", "threads=1", "dtype=float32", "model_dtype=bfloat16"])
def test_what_moves_the_bits_of_activations_trains_again(override):
    assert changed(planned(), planned(override)) >= TRAINED


def test_what_is_fastest_is_found_under_what_it_is_here():
    here = str(fastest_dtype(torch.device("cpu"))).removeprefix("torch.")
    for dtype in ("float32", "bfloat16"):
        trained = changed(planned("model_dtype=fastest"), planned(f"model_dtype={dtype}")) & TRAINED
        assert bool(trained) == (dtype != here)


def test_an_encoder_is_known_by_the_dtype_that_it_computes_in(monkeypatch):
    def trained(encoder: str, fastest: str) -> str:
        monkeypatch.setenv(FASTEST, fastest)
        study = load_study("quick", [f"encoder={encoder}"])
        return next(iter(ensembles.entries(study, study.main, "real")))

    assert trained("fastest", "float32") == trained("float32", "float32") == trained("float32", "bfloat16")
    assert trained("fastest", "bfloat16") != trained("fastest", "float32")


def test_the_text_of_a_dataset_is_known_by_how_much_of_it_is_read():
    def entry(**changed) -> str:
        cell = load_study("quick", ["corpus=some/dataset", *(f"{key}={value}" for key, value in changed.items())]).main
        return texts.text_entry(cell)[0]

    assert entry(tokens=200_000, evaluation_tokens=20_000) != entry(tokens=200_000, evaluation_tokens=1_000_000)
    assert entry(tokens=200_000, evaluation_tokens=1_000_000) == entry(tokens=100_000, evaluation_tokens=1_000_000)
    assert entry(tokens=200_000, evaluation_tokens=20_000) != entry(tokens=100_000, evaluation_tokens=20_000)


def test_seeds_and_nulls_of_one_study_serve_another():
    few, many = (Plan(load_study("quick", ["grid={}", f"seeds={seeds}"], name=f"with-{seeds}")) for seeds in (3, 5))
    few, many = ({entry: key for stage in plan.stages for entry, key in stage.entries.items()} for plan in (few, many))
    seeds_of = [{entry for entry in entries if "/ensembles/topk-256-real" in entry} for entries in (few, many)]
    assert len(seeds_of[0]) == 3
    assert len(seeds_of[1]) == 5
    assert seeds_of[0] < seeds_of[1]
    assert all(few[entry] == many[entry] for entry in seeds_of[0])


@pytest.mark.parametrize(
    "grid", ["model_dtype: [bfloat16]", "norm_cutoff: [3, 4]", "hook_name: [blocks.0.hook_resid_post]", "k: [4]"]
)
def test_every_stage_has_a_name_of_its_own_and_what_it_reads_is_there(grid):
    stages = Plan(load_study("quick", [f"grid={{{grid}}}"])).stages
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:place])


def test_a_recipe_is_found_whatever_else_its_study_trains():
    alone = Plan(load_study("quick", ["grid={}", "tokens=100_000"], name="alone"))
    study = load_study("quick", ["grid={}", "grid.tokens=[100_000]"], name="beside")
    assert study.main.tokens == 200_000
    beside = Plan(study)
    entries = [{entry for stage in plan.stages for entry in stage.entries} for plan in (alone, beside)]
    wanted = {entry for entry in entries[0] if "/ensembles/" in entry}
    assert wanted <= entries[1]


def test_libraries_that_the_code_imports_are_part_of_a_key():
    from sae_stability.experiments import texts, triggers

    def libraries(root) -> set[str]:
        definition = keys.Definition(root.__module__, root.__name__)
        return set(keys.libraries_of(keys.closure([definition])))

    assert {"numpy", "pandas", "scipy"} <= libraries(triggers.compute)
    assert {"transformers", "tokenizers"} & libraries(texts.read_text)
    assert "matplotlib" not in libraries(triggers.compute)
    assert "tqdm" not in libraries(triggers.compute)


def test_code_is_followed_through_modules_packages_and_what_is_asked_of_classes():
    from sae_stability.experiments import ensembles

    reached = keys.closure([keys.Definition(ensembles.__name__, "ensemble")])
    names = {f"{definition.module.removeprefix('sae_stability.')}.{definition.name}" for definition in reached}
    assert {
        "saes.ensemble.Ensemble",  # Ensemble.open(...)
        "files.read_metadata",  # that a method of it calls
        "saes.variant",  # a function of a package, and not the module of the same name
        "saes.sparse.above",  # an attribute of a module
        "saes.compiled._dots",  # behind kernels(tensor).dots
    } - names <= {"saes.sparse.above"}
    assert not {name for name in names if name.startswith(("study", "store", "keys", "errors"))}
    assert not {name for name in names if name.startswith(("figures", "book", "cli", "triggers", "saes.jumprelu"))}


def test_a_script_depends_on_what_it_names(copy):
    script = "from sae_stability.book import page\nfrom sae_stability import figures\nfigures.growth\npage.say"
    before = keys.key_of_script(script, {})
    edit(copy / "experiments" / "triggers.py", "TRIGGER_TOKENS = 300_000", "TRIGGER_TOKENS = 400_000")
    assert keys.key_of_script(script, {}) == before
    edit(copy / "book" / "page.py", "display(Markdown(markdown))", "display(Markdown(markdown + ' '))")
    assert keys.key_of_script(script, {}) != before
    assert keys.key_of_script(script + "\n# a comment", {}) == keys.key_of_script(script, {})


def test_keys_follow_inputs_and_content(tmp_path):
    assert keys.key_of({"a": 1}) == keys.key_of({"a": 1})
    assert keys.key_of({"a": 1}) != keys.key_of({"a": 2})
    assert keys.key_of({"a": 1}) != keys.key_of({"a": 1}, before=["x"])
    (tmp_path / "f.txt").write_text("one")
    before = fingerprint(str(tmp_path))
    (tmp_path / "f.txt").write_text("two!")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("a/hub-id") == "a/hub-id"


def named(source: str) -> set[str]:
    """The names that a function uses and does not bind."""
    import ast

    return {ast.unparse(node) for node in keys._free(ast.parse(source).body[0], frozenset())}


def test_names_that_a_function_binds_are_its_own():
    assert named("def f(a, *b, c=d, **e): g = a; return g.x + h") == {"d", "h"}
    assert named("def f():\n x = [i for i in range(3)]\n return i") == {"range", "i"}
    assert named("def f():\n def inner(y): z = y; return z\n return inner(z)") == {"z"}
    assert named("@wrap\ndef f(a: Kind) -> Other: return lambda b: a + b + c") == {"wrap", "Kind", "Other", "c"}
    assert named("def f(): return module.part.name(module.other)") == {"module.part.name", "module.other"}
    assert named("class A(Base):\n x: int = y\n def m(self): return self.x + Base.k") == {"Base", "int", "x", "y", "Base.k"}
    assert named("def f():\n for i, (j, k) in w: pass\n with o as p: return {q: i for q in p} | {**r}") == {"w", "o", "r"}
