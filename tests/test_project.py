import re
import tomllib

import yaml

from sae_stability import places
from sae_stability.files import read_json, sha256


def locked() -> dict[str, str]:
    lines = (places.root() / "requirements.lock").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (pin.split("==") for pin in pins)}


def test_every_dependency_is_pinned_within_its_bounds():
    from packaging.requirements import Requirement

    project = tomllib.loads((places.root() / "pyproject.toml").read_text())["project"]
    pins = locked()
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(pins[name], prereleases=True), line
    assert pins["torch"] == "2.13.0"


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((places.root() / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "--requirement requirements.lock" in pip
    others = [entry for entry in environment["dependencies"] if not isinstance(entry, dict)]
    assert all(entry.startswith(("python", "pip")) for entry in others)


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((places.root() / "CITATION.cff").read_text())
    assert citation["cff-version"]
    assert "2606.12138" in str(citation["references"])


def test_all_metadata_say_the_same():
    project = tomllib.loads((places.root() / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((places.root() / "CITATION.cff").read_text())
    codemeta, zenodo = (read_json(places.root() / name) for name in ("codemeta.json", ".zenodo.json"))
    assert project["version"] == citation["version"] == codemeta["version"] == zenodo["version"]
    assert project["license"] == citation["license"] == zenodo["license"] == codemeta["license"].rpartition("/")[2]
    assert project["name"] == codemeta["name"]
    assert citation["title"] == zenodo["title"]
    assert str(citation["date-released"]) == codemeta["datePublished"]
    assert project["keywords"] == codemeta["keywords"] == zenodo["keywords"]
    (paper,) = citation["references"]
    assert paper["title"] == codemeta["referencePublication"]["name"]
    identifiers = {codemeta["referencePublication"]["identifier"], zenodo["related_identifiers"][0]["identifier"]}
    assert identifiers == {paper["identifiers"][0]["value"]}


def test_published_tables_are_those_that_their_provenance_names():
    folders = {path.parent for path in (places.root() / "published").rglob("*.parquet")}
    assert folders
    for folder in folders:
        if folder.name in ("worlds", "costs"):  # no study
            made = [read_json(table.with_suffix(".json")) for table in folder.glob("*.parquet")]
            assert not any("+changes" in each["commit"] for each in made)
            continue
        provenance = read_json(folder / "provenance.json")
        assert "+changes" not in provenance["commit"]
        assert provenance["study"]["name"] == folder.name
        of_verdicts = read_json(folder / "claims.provenance.json")
        assert of_verdicts["commit"] == provenance["commit"]
        files = provenance["files"] | of_verdicts["files"]
        for file in (*folder.glob("*.parquet"), folder / "claims.json"):
            assert files[file.name]["sha256"] == sha256(file), file
