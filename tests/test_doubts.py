"""What `stability` says before and after it compares: doubtful input and doubtful results are named."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers import drawn, random_ensemble
from sae_stability.errors import UserError
from sae_stability.existing import Site, centred, compare, report
from sae_stability.existing.report import SCHEMA_FILE
from sae_stability.files import read_json
from sae_stability.matching import assign
from sae_stability.saes import formats
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE

D_IN, D_SAE = 128, 160  # as wide as the residual stream of docstrings-2l


def sae(seed: int, bias: float = 0.0, features: int = D_SAE) -> SAE:
    W = drawn(features, D_IN, seed=seed)
    return SAE("relu", None, Parameters(W, torch.full((features,), bias), W, torch.zeros(D_IN)))


def folder(path, seed: int, bias: float = 0.0, **config):
    """An SAE as SAELens writes it, with more in its configuration."""
    formats.save(sae(seed, bias), path)
    told = read_json(path / "cfg.json")
    (path / "cfg.json").write_text(json.dumps(told | config))
    return path


@pytest.fixture
def site(text_file):
    return Site("docstrings-2l", str(text_file), "blocks.1.hook_resid_pre", 3000)


def test_an_sae_and_its_copy_are_said_to_be_the_same(tmp_path):
    one, other = folder(tmp_path / "one", 0), folder(tmp_path / "two", 1)
    copy = folder(tmp_path / "copy", 0, note="another configuration")
    for given in ([one, other, copy], [one, one / "sae_weights.safetensors", other]):
        with pytest.raises(UserError, match="bit for bit; an SAE matches itself"):
            compare(given)
    assert len(compare([one, other]).saes) == 2


def test_an_sae_in_another_order_or_of_another_length_is_asked_about(tmp_path):
    one, other = folder(tmp_path / "one", 0), folder(tmp_path / "two", 1)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    W = sae(0).directions
    turned = SAE("relu", None, Parameters(W[order], torch.zeros(D_SAE), 3 * W[order], torch.zeros(D_IN)))
    formats.save(turned, tmp_path / "turned")
    assert "one and turned have the same ones" in compare([one, other, tmp_path / "turned"]).notes["same directions"]
    assert "same directions" not in compare([one, other]).notes
    fewer = SAE("relu", None, Parameters(W[:50], torch.zeros(50), W[:50], torch.zeros(D_IN)))
    assert "same directions" not in compare([sae(0), fewer]).notes  # one has more


def test_sizes_that_a_configuration_gives_otherwise_are_told(tmp_path):
    alike = [folder(tmp_path / f"alike{s}", s) for s in range(2)]
    assert "sizes differ" not in compare(alike).notes
    other = folder(tmp_path / "other", 2, d_sae=99)
    assert f"other: cfg.json says d_sae 99, and its weights have {D_SAE}" in compare([*alike, other]).notes["sizes differ"]


def test_sites_and_models_that_files_name_are_told_where_they_differ(tmp_path, site):
    alike = [folder(tmp_path / f"alike{s}", s, hook_name="blocks.1.hook_resid_pre", model_name="docstrings-2l") for s in range(2)]
    assert not {"sites differ", "another site"} & set(compare(alike, site=site).notes)
    layers = [folder(tmp_path / f"layer{s}", s, hook_name=f"blocks.{s}.hook_resid_pre") for s in range(2)]
    assert "blocks.0.hook_resid_pre" in compare(layers).notes["sites differ"]
    assert "layer0 is of blocks.0.hook_resid_pre by its file" in compare(layers, site=site).notes["another site"]
    theirs = [folder(tmp_path / f"model{s}", s, hook_name=site.hook_name, model_name="gpt2") for s in range(2)]
    assert "of gpt2 by its file" in compare(theirs, site=site).notes["another site"]
    gemma = [folder(tmp_path / f"gemma{s}", 7 + s, hook_name="model.layers.1.output") for s in range(2)]
    assert "another site" not in compare(gemma, site=site).notes  # in another library's words
    local = [folder(tmp_path / f"local{s}", s, hook_name=site.hook_name, model_name="hub/Docstrings-2L") for s in range(2)]
    assert "another site" not in compare(local, site=site).notes


def test_an_sae_that_never_fires_is_said_before_anything_is_written(tmp_path, site, call):
    paths = [folder(tmp_path / f"sae{s}", s, bias=-1e9 if s == 2 else 0.0) for s in range(3)]
    with pytest.raises(UserError, match=r"sae2: none of its features fires on [\d,]+ tokens"):
        compare(paths, site=site)
    arguments = ("--model", site.model, "--corpus", site.corpus, "--hook-name", site.hook_name, "--tokens", 3000)
    status, _, error = call("stability", *paths, *arguments, "--out", tmp_path / "rows.csv")
    assert (status, len(error)) == (2, 1)
    assert not (tmp_path / "rows.csv").exists()


def test_little_text_and_decoders_on_their_side_are_noted(tmp_path, site):
    assert "tokens: features that fire rarely look dead" in compare([sae(0), sae(1)], site=site).notes["little text"]
    assert "lies on its side" in compare([sae(s, features=40) for s in range(2)]).notes["few features"]
    assert compare([sae(0), sae(1)]).notes == {}


def test_directions_are_compared_where_an_encoder_is_not_understood_and_firings_are_not_counted(tmp_path, site):
    paths = [folder(tmp_path / f"sae{s}", s, normalize_activations="layer_norm") for s in range(3)]
    alone, at_site = compare(paths), compare(paths, site=site)
    assert at_site.firings is None
    assert at_site.notes["directions only"].startswith("sae0 and 2 more: activations are normalised at run time")
    assert at_site.notes["directions only"].endswith("firings are not counted")
    assert "directions only" in alone.summary()
    assert torch.equal(alone.found.counts, at_site.found.counts)


def test_seeds_are_not_enough_where_nothing_is_to_be_known():
    assert "no feature comes back" in compare([sae(s) for s in range(4)]).summary()
    assert "live features, too few" in compare([sae(s, features=10) for s in range(4)]).summary()


def test_means_are_shares_whatever_their_interval():
    shared = sae(0)
    W = shared.W_dec.clone()
    W[: D_SAE // 2] = drawn(D_SAE // 2, D_IN, seed=9)
    half = SAE(None, None, Parameters(W, torch.zeros(D_SAE), W, torch.zeros(D_IN)))
    compared = compare([shared, half, sae(1)])
    assert 0 <= compared.found.mean().low <= compared.found.mean().high <= 1
    for share in compared.found.shares().values():
        assert 0 <= share.low <= share.high <= 1


def test_files_of_a_model_with_centred_weights_are_asked_on_centred_activations(tmp_path, site):
    """A feature that reads the mean of an activation never fires where that mean is zero."""
    paths = []
    for seed in range(2):
        W = drawn(D_SAE, D_IN, seed=seed)
        W[0] = 1
        made = SAE("relu", None, Parameters(W, torch.full((D_SAE,), -1e-3), W, torch.zeros(D_IN)))
        formats.save(made, tmp_path / f"sae{seed}")
        told = read_json(tmp_path / f"sae{seed}" / "cfg.json")
        kwargs = {"metadata": told["metadata"] | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
        (tmp_path / f"sae{seed}" / "cfg.json").write_text(json.dumps(told | kwargs))
        paths.append(tmp_path / f"sae{seed}")
    compared = compare(paths, site=site)
    assert "centred" in compared.notes
    assert not compared.firings.counts[:, 0].any()
    assert compared.firings.counts[:, 1:].any()
    with pytest.raises(UserError, match="others are not; take them without --model"):
        compare([*paths, folder(tmp_path / "other", 5)], site=site)
    assert centred([sae(0)]) is False
    x = torch.cat(list(site.activations([sae(0)], "raw")))
    less = torch.cat(list(site.activations([sae(0)], "centred", centred=True)))
    torch.testing.assert_close(less, x - x.mean(1, keepdim=True))
    beyond = replace(site, hook_name="blocks.0.attn.hook_z")  # what heads give is not written to the stream yet
    whole, same = (torch.cat(list(beyond.activations([sae(0)], "heads", which))) for which in (False, True))
    assert torch.equal(whole, same)


def test_seeds_of_an_ensemble_are_compared_by_its_path(tmp_path, call):
    ensemble = random_ensemble("topk", D_IN, D_SAE, 4, torch.zeros(D_IN), 1.0, 3)
    (tmp_path / "real").mkdir()
    ensemble.save(tmp_path / "real" / "ensemble.safetensors")
    status, out, error = call("stability", tmp_path / "real", "--out", tmp_path / "rows.json")
    assert (status, error) == (0, [])
    assert "3 SAEs of 160 features" in out
    told = read_json(tmp_path / "rows.json")
    assert [each["name"] for each in told["saes"]] == [f"real seed {seed}" for seed in ensemble.seeds]


def test_the_report_is_of_its_schema_and_holds_the_full_matching(tmp_path, site, call):
    schema = read_json(SCHEMA_FILE)
    W = drawn(D_SAE, D_IN)
    W[0] = 0  # matches nothing
    odd = SAE(None, None, Parameters(W, torch.zeros(D_SAE), W, torch.zeros(D_IN)))
    for compared in (compare([sae(0), sae(1), sae(2)], site=site), compare([odd, sae(1, features=200)])):
        told = json.loads(json.dumps(report(compared), allow_nan=False))
        jsonschema.validate(told, schema)
        assert len(told["matches"]) == len(compared.saes) * (len(compared.saes) - 1)
        for match in told["matches"]:
            s, t = compared.names.index(match["of"]), compared.names.index(match["in"])
            own = slice(0, len(compared.saes[s].directions))
            cosine = np.array([np.nan if value is None else value for value in match["cosine"]])
            np.testing.assert_allclose(cosine, compared.found.best_cosine[s, t, own], atol=1e-6)
            partner = [-1 if value is None else value for value in match["partner"]]
            assert partner == compared.found.partner[s, t, own].tolist()
    assert told["features"][0]["alive"][0] is False
    assert told["features"][0]["stability"][0] is None


def test_a_report_of_another_shape_is_not_of_the_schema():
    told = report(compare([sae(0), sae(1)]))
    for broken in (told | {"version": 2}, {key: value for key, value in told.items() if key != "matches"}, told | {"saes": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, read_json(SCHEMA_FILE))


@pytest.mark.parametrize(
    ("out", "said"),
    [("rows.txt", "name a .csv"), ("nowhere/rows.csv", "there is no folder"), (".", "name a .csv"), ("folder.csv", "a folder")],
)
def test_where_the_result_can_not_go_is_said_before_the_work(tmp_path, call, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    status, _, error = call("stability", "nowhere0", "nowhere1", "--out", out)
    assert (status, len(error)) == (2, 1)
    assert said in error[0]


def test_a_narrow_and_a_wide_dictionary_are_paired_without_all_cosines(monkeypatch):
    """Their products are more than the largest problem that is solved whole; the mean stays near that of the whole solution."""
    A, B = drawn(50, 16), torch.cat([drawn(50, 16) + 0.3 * drawn(50, 16, seed=3), drawn(400, 16, seed=2)])
    whole, some = assign(A, B, exact=1000), assign(A, B, exact=60)
    assert (some.partner >= 0).all()
    assert whole.mean - 0.01 < some.mean <= whole.mean + 1e-6
    assert some.bound >= whole.mean - 1e-6


def test_a_lone_decoder_with_a_site_asks_for_its_encoder(tmp_path, site):
    for seed in range(2):
        save_file({"W_dec": drawn(D_SAE, D_IN, seed=seed)}, tmp_path / f"{seed}.safetensors")
    with pytest.raises(UserError, match="decoder only"):
        compare([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], site=site)
