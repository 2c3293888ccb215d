import re
import tomllib

import yaml

from sae_stability.config import ROOT
from sae_stability.store import read_json, sha256


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (pin.split("==") for pin in pins)}


def test_every_dependency_is_pinned_within_its_bounds():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = locked()
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(pins[name], prereleases=True), line
    assert pins["torch"] == "2.13.0"


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "--requirement requirements.lock" in pip
    others = [entry for entry in environment["dependencies"] if not isinstance(entry, dict)]
    assert all(entry.startswith(("python", "pip")) for entry in others)


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"]
    assert "2606.12138" in str(citation["references"])


def test_published_tables_are_those_that_their_provenance_names():
    folders = [path for path in (ROOT / "published").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        provenance = read_json(folder / "provenance.json")
        assert "+changes" not in provenance["commit"]
        assert provenance["study"]["name"] == folder.name
        for table in folder.glob("*.parquet"):
            assert provenance["files"][table.name]["sha256"] == sha256(table), table


def test_modules_import_only_from_those_before_them():
    order = [
        "errors",
        "config",
        "threads",
        "store",
        "statistics",
        "language",
        "saes",
        "methods",
        "training",
        "evaluation",
        "matching",
        "ablation",
        "triggers",
        "explanations",
        "existing",
        "results",
        "tables",
        "claims",
    ]
    order += ["stages", "pipeline", "figures", "book", "cli"]
    rank = {name: place for place, name in enumerate(order)}
    for file in (ROOT / "src" / "sae_stability").rglob("*.py"):
        module = file.relative_to(ROOT / "src" / "sae_stability").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for imported in re.findall(r"^from sae_stability(?:\.(\w+))?[\w.]* import (.*)$", file.read_text(), re.M):
            names = [imported[0]] if imported[0] else re.findall(r"\w+", imported[1])
            for name in names:
                assert rank[name] <= rank[module], f"{file.name} imports {name}"
