import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from helpers import drawn
from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.existing import ENOUGH, Site, compare, comparison
from sae_stability.language import corpus, models
from sae_stability.matching import mcc, stability
from sae_stability.saes import formats, variant
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.reading import About
from sae_stability.saes.sae import SAE


@pytest.fixture
def files(tmp_path):
    """Four decoders: half of each is common to all, in another order and length."""
    paths = []
    for seed in range(4):
        W = torch.cat([drawn(15, 30), drawn(15, 30, seed=10 + seed)])[torch.randperm(30)] * (1 + seed)
        save_file({"W_dec": W}, tmp_path / f"seed{seed}.safetensors")
        paths.append(tmp_path / f"seed{seed}.safetensors")
    return paths


def test_three_lines_give_what_matching_gives(files):
    compared = compare(files)
    W = torch.stack([formats.load(path).W_dec for path in files])
    torch.testing.assert_close(compared.found.probability, stability(W).probability)
    assert compared.found.mean().value == 0.5
    assert compared.mcc == pytest.approx(sum(mcc(W[s], W[t]) for s in range(4) for t in range(s)) / 6, abs=1e-6)
    assert compared.names == [path.name for path in files]


def test_the_command_writes_one_row_per_feature_and_a_summary(files, call, tmp_path):
    status, out, error = call("stability", *files, "--out", tmp_path / "rows.parquet")
    assert status == 0, error
    table = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(table) == 120
    common = table[table["matches"] == 3]
    assert len(common) == 60
    first = table[table["sae"] == "seed0.safetensors"].query("matches == 3").iloc[0]
    partner = table[(table["sae"] == "seed2.safetensors") & (table["feature"] == first["partner in seed2.safetensors"])].iloc[0]
    assert partner["partner in seed0.safetensors"] == first["feature"]
    assert partner["norm"] == pytest.approx(3 * first["norm"], rel=1e-4)
    for told in ("mean stability   0.500", "stable           0.500", "unstable         0.500", "MCC", "--model", "enough"):
        assert told in out


def test_narrower_saes_are_compared_too_and_said(files, call, tmp_path):
    save_file({"W_dec": drawn(15, 30)}, tmp_path / "narrow.safetensors")
    _, out, _ = call("stability", *files, tmp_path / "narrow.safetensors", "--out", tmp_path / "rows.csv")
    assert "widths differ" in out
    table = pd.read_csv(tmp_path / "rows.csv")
    assert (table["sae"] == "narrow.safetensors").sum() == 15
    assert (table[table["sae"] == "narrow.safetensors"]["matches"] == 4).all()


def test_dictionaries_in_memory_are_compared_as_their_files_are(files):
    saes = [formats.load(path) for path in files]
    from_files, from_memory = compare(files), compare(saes)
    assert torch.equal(from_memory.found.probability, from_files.found.probability)
    assert from_memory.names == [f"dictionary {position}" for position in range(4)]
    assert compare([files[0], *saes[1:]]).names == ["seed0.safetensors", "dictionary 1", "dictionary 2", "dictionary 3"]
    with pytest.raises(UserError, match="given twice"):
        compare([saes[0], saes[0]])


def test_directions_whose_sign_says_nothing_are_not_compared_as_if_it_did(files):
    class Signed(SAE):
        signed = True

    saes = [formats.load(path) for path in files[:2]]
    with pytest.raises(UserError, match=r"dictionary 1: its codes have a sign"):
        compare([saes[0], Signed(None, None, saes[1].parameters)])


def test_chance_is_that_of_the_directions_own_second_moments():
    """Directions on one axis, all but for a little: any two others of that kind match, while isotropic ones never do."""
    axis = 3 * F.one_hot(torch.tensor(4), 30)
    narrow = [SAE(None, None, parameters_of(axis * drawn(60, 1, seed=s) + 0.01 * drawn(60, 30, seed=9 + s))) for s in range(3)]
    isotropic = [SAE(None, None, parameters_of(drawn(60, 30, seed=s))) for s in range(3)]
    assert compare(narrow).chance > 0.7
    assert compare(isotropic).chance < 0.1
    assert compare(isotropic).found.mean().value < 0.1


def parameters_of(W: torch.Tensor) -> Parameters:
    return Parameters(W, torch.zeros(len(W)), W, torch.zeros(W.shape[1]))


def test_whether_seeds_are_enough_depends_on_what_is_known(files):
    few = compare(files[:3])
    width = max((of.high - of.low) / 2 for of in few.found.latent_shares().values())
    assert ("too few" in few.summary()) == (width > ENOUGH)
    assert "too few: intervals need three" in compare(files[:2]).summary()


def site_saes(tmp_path, d_in: int) -> list:
    """Three TopK SAEs, one of whose features can never fire."""
    paths = []
    for seed in range(3):
        parameters = variant("topk")(4).initialise(d_in, 24, torch.Generator().manual_seed(seed))
        parameters.b_enc[5] = -1e6
        formats.save(SAE("topk", 4, parameters), tmp_path / f"sae{seed}")
        paths.append(tmp_path / f"sae{seed}")
    return paths


def test_a_model_and_a_text_tell_dead_features_from_live_ones(tmp_path, call):
    bridge = models.load("docstrings-2l")
    paths = site_saes(tmp_path, bridge.cfg.d_model)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Return the sum of array number {i} over the given axis, or zero." for i in range(300)))
    given = ["--model", "docstrings-2l", "--corpus", text, "--hook-name", "blocks.1.hook_resid_pre", "--tokens", "2000"]
    status, out, error = call("stability", *paths, *given, "--out", tmp_path / "rows.csv")
    assert status == 0, error
    table = pd.read_csv(tmp_path / "rows.csv")
    assert not table.query("feature == 5")["alive"].any()
    assert (table.query("feature == 5")["frequency"] == 0).all()
    assert table.groupby("sae")["frequency"].sum().between(3.5, 4.001).all()  # k of them fire on a token
    assert "never fire" in out


def test_saes_of_several_recipes_are_told():
    def sae(name: str, k: int | None, seed: int) -> SAE:
        return SAE(name, k, parameters_of(drawn(30, 12, seed=seed)))

    assert "recipes differ" not in compare([sae("topk", 8, 0), sae("topk", 8, 1)]).notes
    told = compare([sae("topk", 8, 0), sae("relu", None, 1)]).notes["recipes differ"]
    assert told.startswith("dictionary 0: topk, k 8; dictionary 1: relu: ")
    assert "topk, k 8; dictionary 1: topk, k 4" in compare([sae("topk", 8, 0), sae("topk", 4, 1)]).notes["recipes differ"]
    unknown = SAE(None, None, parameters_of(drawn(30, 12, seed=1)))  # directions alone tell no recipe
    assert "recipes differ" not in compare([sae("topk", 8, 0), unknown]).notes


def test_what_a_block_writes_is_what_the_next_one_reads():
    def about(hook_name: str) -> About:
        return About(Path(), "gpt2", hook_name)

    assert not comparison._elsewhere(about("blocks.3.hook_resid_pre"), about("blocks.2.hook_resid_post"))
    assert comparison._place(about("blocks.3.hook_resid_pre")) == comparison._place(about("blocks.2.hook_resid_post"))
    assert comparison._elsewhere(about("blocks.3.hook_resid_pre"), about("blocks.3.hook_resid_post"))
    assert comparison._elsewhere(about("blocks.0.hook_resid_pre"), about("blocks.0.hook_resid_post"))
    assert comparison._elsewhere(about("blocks.3.hook_mlp_out"), about("blocks.3.hook_resid_post"))


def test_how_dead_features_are_found_is_told_unless_nothing_finds_them(files):
    summary = compare(files[:2]).summary()
    assert "; --model, --corpus and --hook-name together find them" in summary
    assert "of all features" in summary
    tried = comparison.Comparison(**vars(compare(files[:2])) | {"notes": {"directions only": "none of them encodes"}})
    assert "--model" not in tried.summary()


def test_python_takes_a_site_too(tmp_path, text_file):
    paths = site_saes(tmp_path, models.load("docstrings-2l").cfg.d_model)
    compared = compare(paths, site=Site("docstrings-2l", str(text_file), "blocks.1.hook_resid_pre", 2000))
    assert not compared.found.alive[:, 5].any()
    assert compared.firings.tokens >= 2000
    assert compared.found.alive.any(1).all()


def test_a_model_in_bfloat16_fires_nearly_the_same_features(tmp_path, text_file):
    saes = [formats.load(path) for path in site_saes(tmp_path, models.load("docstrings-2l").cfg.d_model)]
    given = ("docstrings-2l", str(text_file), "blocks.1.hook_resid_pre", 2000)
    full, half = (Site(*given, model_dtype=dtype).count(saes, 24) for dtype in (torch.float32, torch.bfloat16))
    assert half.tokens == full.tokens
    assert not torch.equal(half.counts, full.counts)
    assert (half.counts - full.counts).abs().sum() < 0.05 * full.counts.sum()


def test_only_held_out_documents_are_read_and_no_more_than_it_takes(text_file, monkeypatch):
    bridge, packed = models.load("docstrings-2l"), []
    pack = corpus.pack
    monkeypatch.setattr(corpus, "pack", lambda documents, *rest: packed.append(documents) or pack(documents, *rest))
    site = Site("docstrings-2l", str(text_file), "blocks.1.hook_resid_pre", 500)
    site.count([SAE("topk", 4, variant("topk")(4).initialise(bridge.cfg.d_model, 24, torch.Generator()))], 24)
    held_out = corpus.load(str(text_file)).evaluation
    (documents,) = packed
    assert documents == held_out[: len(documents)]
    assert len(documents) < len(held_out)
    assert sum(map(len, documents)) >= corpus.CHARACTERS_A_TOKEN * 500


def test_a_text_that_fills_no_context_is_said(tmp_path):
    (tmp_path / "short.txt").write_text("one line\n\nanother")
    with pytest.raises(UserError, match=r"corpus: the held-out documents of .*short\.txt fill no context"):
        Site("docstrings-2l", str(tmp_path / "short.txt"), "blocks.1.hook_resid_pre", 500).count([], 24)


def pad(W: torch.Tensor) -> torch.Tensor:
    return F.pad(W, (0, 1))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{0}"], "two or more"),
        (["{0}", "{0}"], "twice"),
        (["{0}", "{wide}"], "d_in"),
        (["{0}", "nowhere"], "nowhere"),
        (["{0}", "{1}", "--threshold", "1.5"], "threshold"),
        (["{0}", "{1}", "--out", "rows.xls"], "--out"),
        (["{0}", "{1}", "--model", "docstrings-2l"], "--corpus"),
        (
            ["{0}", "{1}", "--model", "docstrings-2l", "--corpus", "{text}", "--hook-name", "blocks.1.hook_resid_pre"],
            "decoder only|d_in",
        ),
        ([], "PATH"),
    ],
)
def test_mistakes_end_in_one_line(files, call, tmp_path, text_file, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    save_file({"W_dec": pad(drawn(30, 30))}, tmp_path / "wide.safetensors")
    given = [argument.format(*files, wide=tmp_path / "wide.safetensors", text=text_file) for argument in arguments]
    status, _, error = call("stability", *given)
    assert status == 2
    assert len(error) == 1
    assert re.search(named, error[0]), error
    assert not (tmp_path / "stability.csv").exists()


def test_the_readme_s_lines_run(files):
    readme = (places.root() / "README.md").read_text(encoding="utf-8")
    start = readme.index("from sae_stability.existing import compare")
    lines = readme[start : readme.index("```", start)]
    scope: dict = {}
    exec(lines.replace('["sae-seed0", "sae-seed1", "sae-seed2"]', repr([str(path) for path in files])), scope)
    assert len(scope["table"]) == 120
    with pytest.raises(UserError):
        compare(files[:1])
