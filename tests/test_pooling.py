"""Pools against brute force, planted features and invariances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_stability import pooling
from sae_stability.errors import UserError
from sae_stability.experiments import ensembles, texts
from sae_stability.files import read_json, read_metadata
from sae_stability.pooling import assembled, distinct, measure, pool, stars, unlike
from sae_stability.saes import formats, variant
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE

D_IN, FEATURES, K = 24, 20, 3
VARIANTS = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")


def truth() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(0)))[0][:FEATURES]


def tokens(count: int = 2000) -> torch.Tensor:
    """Sums of `K` true features."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(count, FEATURES, generator=generator).topk(K, dim=1).indices
    z = torch.zeros(count, FEATURES).scatter_(1, chosen, 0.5 + torch.rand(count, K, generator=generator))
    return z @ truth()


def sae(seed: int, kind: str = "topk", noise: float = 0.05, features: int = FEATURES) -> SAE:
    """The first true features in another order, each with noise of its own."""
    generator = torch.Generator().manual_seed(100 + seed)
    directions = truth()[:features] + noise * torch.randn(features, D_IN, generator=generator)
    directions = F.normalize(directions, dim=1)[torch.randperm(features, generator=generator)]
    weights = {
        "W_enc_rows": directions.clone(),
        "b_enc": torch.full((features,), -0.1),
        "W_dec": directions,
        "b_dec": torch.zeros(D_IN),
    }
    own = {"log_threshold": torch.full((features,), 0.2).log(), "threshold": torch.tensor(0.2)}
    own |= {"r_mag": torch.zeros(features), "b_mag": torch.full((features,), -0.05)}
    names = variant(kind).parameters.__dataclass_fields__
    return SAE(
        kind,
        K if kind in ("topk", "batchtopk", "matryoshka") else None,
        variant(kind).parameters(**{n: (weights | own)[n] for n in names}),
    )


def same_rows(one: torch.Tensor, other: torch.Tensor, within: float = 1e-5) -> bool:
    """Whether two sets of directions are equal but for their order."""
    return len(one) == len(other) and bool((torch.cdist(one, other).min(1).values < within).all())


@pytest.mark.parametrize("representative", ["mean", "medoid"])
def test_a_star_is_the_mean_or_the_medoid_of_its_members(representative):
    saes = [sae(seed) for seed in range(4)]
    pooled = pool(saes, tokens(), representative=representative)
    assert pooled.stars.size.tolist() == [4] * FEATURES
    for feature, (members, medoid) in enumerate(zip(pooled.stars.members, pooled.stars.medoid, strict=True)):
        rows = [each.parameters.W_enc_rows[member] for each, member in zip(saes, members, strict=True)]
        expected = rows[medoid] if representative == "medoid" else sum(rows) / 4
        assert torch.allclose(pooled.sae.parameters.W_enc_rows[feature], expected, atol=1e-6)
        assert torch.allclose(pooled.sae.W_dec[feature], F.normalize(expected, dim=0), atol=1e-6)


def test_a_mean_is_nearer_to_the_truth_than_any_member():
    saes = [sae(seed, noise=0.15) for seed in range(8)]
    pooled = pool(saes, tokens())
    nearest = [
        float((F.normalize(each, dim=1) @ truth().T).amax(0).mean()) for each in (pooled.sae.W_dec, *(s.W_dec for s in saes))
    ]
    assert nearest[0] > max(nearest[1:])


def test_those_met_in_most_saes_come_first_and_of_these_the_strongest():
    saes = [sae(0, features=12), sae(1, features=20), sae(2, features=20)]
    pooled = pool(saes, tokens(), kind="union")
    assert pooled.stars.size.tolist() == [3] * 12 + [2] * 8
    assert pooled.stars.stability.tolist() == [1.0] * 12 + [0.5] * 8
    for part in (slice(0, 12), slice(12, 20)):
        assert (np.diff(pooled.stars.energy[part]) <= 0).all()
    assert len(pool(saes, tokens(), kind="width").stars) == 17  # the mean of 12, 20 and 20
    assert len(pool(saes, tokens(), kind="consensus", quorum=1.0).stars) == 12
    assert len(pool(saes, tokens(), kind="consensus", quorum=0.5).stars) == 20


def test_the_energy_of_a_star_is_the_mean_of_its_members():
    saes = [sae(0), sae(1)]
    pooled, x = pool(saes, tokens()), tokens()
    written = [each.encode(x).square().mean(0) * each.W_dec.square().sum(1) for each in saes]
    for energy, (one, other) in zip(pooled.stars.energy, pooled.stars.members, strict=True):
        assert energy == pytest.approx(float(written[0][one] + written[1][other]) / 2, rel=1e-4)


def test_an_sae_pooled_with_itself_is_itself_but_for_near_duplicates():
    alone = sae(0)
    doubled = alone.parameters._replace(
        **{name: torch.cat([tensor, tensor[:2]]) for name, tensor in alone.parameters._asdict().items() if name != "b_dec"}
    )
    pooled = pool([replace(alone, parameters=doubled)] * 2, tokens(), kind="union")
    assert same_rows(pooled.sae.W_dec, alone.W_dec)
    x = tokens()
    assert torch.allclose(pooled.sae.decode(pooled.sae.encode(x)), alone.decode(alone.encode(x)), atol=1e-5)


@pytest.mark.parametrize("representative", ["mean", "medoid"])
def test_neither_the_order_of_saes_nor_a_rotation_of_the_space_matters(representative):
    saes, x = [sae(seed, "jumprelu", noise=0.1) for seed in range(3)], tokens()
    pooled = pool(saes, x, representative=representative)
    turned = pool(saes[::-1], x, representative=representative)
    assert same_rows(pooled.sae.W_dec, turned.sae.W_dec)
    rotation = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(2)))[0]

    def rotated(each: SAE) -> SAE:
        weights = each.parameters
        return replace(
            each,
            parameters=weights._replace(
                W_enc_rows=weights.W_enc_rows @ rotation, W_dec=weights.W_dec @ rotation, b_dec=weights.b_dec @ rotation
            ),
        )

    assert same_rows(
        pool([rotated(each) for each in saes], x @ rotation, representative=representative).sae.W_dec,
        pooled.sae.W_dec @ rotation,
        1e-4,
    )


def test_a_dead_feature_stays_out():
    saes = [sae(seed) for seed in range(3)]
    for each in saes:
        each.parameters.b_enc[4] = -100
    pooled = pool(saes, tokens(), kind="union")
    assert all(4 not in members for members in pooled.stars.members)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.2, 0.9))
def test_no_two_directions_of_a_pool_reach_the_threshold(seed, threshold):
    W_dec = torch.randn(3, 30, 6, generator=torch.Generator().manual_seed(seed))
    saes = [SAE(None, None, Parameters(torch.zeros(30, 6), torch.zeros(30), rows, torch.zeros(6))) for rows in W_dec]
    for representative in ("mean", "medoid"):
        pooled = pool(saes, kind="union", threshold=threshold, representative=representative)
        cosines = pooled.sae.W_dec @ pooled.sae.W_dec.T - 2 * torch.eye(len(pooled.stars))
        assert cosines.max() < threshold
        counts = [np.unique(members[members >= 0], return_counts=True)[1] for members in pooled.stars.members.T]
        assert all((each == 1).all() for each in counts)


def test_the_first_of_rows_that_are_alike_stays(monkeypatch):
    monkeypatch.setattr(pooling, "CHUNK", 7)
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    directions, kept = F.normalize(rows, dim=1), []
    for row in range(40):
        if all(directions[row] @ directions[before] < 0.8 for before in kept):
            kept.append(row)
    assert np.flatnonzero(distinct(rows, 0.8)).tolist() == kept


@pytest.mark.parametrize("representative", ["mean", "medoid"])
def test_every_pool_is_the_beginning_of_the_union(representative, monkeypatch):
    """Where looking ends early, in blocks of rows."""
    monkeypatch.setattr(pooling, "CHUNK", 4)
    common = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(1))
    rows = F.normalize(common + 0.6 * noise, dim=2)
    saes = [SAE(None, None, Parameters(torch.zeros(20, 12), torch.zeros(20), each, torch.zeros(12))) for each in rows]
    union = pool(saes, kind="union", threshold=0.7, representative=representative)
    assert len(union.stars) > 20
    for kind, count in (("width", 20), ("consensus", int((union.stars.size >= 3).sum()))):
        found = pool(saes, kind=kind, threshold=0.7, representative=representative, quorum=0.75)
        assert 0 < len(found.stars) == count
        assert np.array_equal(found.stars.members, union.stars.members[:count])
        assert torch.equal(found.sae.directions, union.sae.directions[:count])


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_fires_as_often_as_its_saes(kind):
    saes, x = [sae(seed, kind, noise=0.12) for seed in range(3)], tokens()
    for shift in (0.0, 0.15):  # means of encoders fire as often or not at all as often
        for each in saes:
            each.parameters.b_enc.sub_(shift)
        pooled = pool(saes, x)
        l0 = np.mean([measure(each, x).l0 for each in saes])
        assert measure(pooled.sae, x).l0 == pytest.approx(l0, rel=0.02)
    assert pooled.sae.variant == ("batchtopk" if kind == "matryoshka" else kind)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_how_a_length_is_shared_between_direction_and_code_does_not_matter(kind):
    saes, x = [sae(seed, kind) for seed in range(2)], tokens()
    longer = []
    for each in saes:
        weights, by = each.parameters, torch.linspace(0.5, 3, FEATURES)
        changed = {
            "W_dec": weights.W_dec * by[:, None],
            "W_enc_rows": weights.W_enc_rows / by[:, None],
            "b_enc": weights.b_enc / by,
        }
        changed |= {"b_mag": weights.b_mag / by} if kind == "gated" else {}
        changed |= {"log_threshold": weights.log_threshold - by.log()} if kind == "jumprelu" else {}
        longer.append(replace(each, parameters=weights._replace(**changed)))
        assert torch.allclose(longer[-1].decode(longer[-1].encode(x)), each.decode(each.encode(x)), atol=1e-5)
    one, other = pool(saes, x), pool(longer, x)
    assert torch.allclose(one.sae.decode(one.sae.encode(x)), other.sae.decode(other.sae.encode(x)), atol=1e-4)


def test_a_pool_is_read_back_as_it_was_written(tmp_path):
    pooled, x = pool([sae(seed) for seed in range(3)], tokens()), tokens()
    for format in formats.FORMATS:
        formats.save(pooled.sae, tmp_path / format, format)
        again = formats.load(tmp_path / format)
        assert torch.allclose(again.decode(again.encode(x)), pooled.sae.decode(pooled.sae.encode(x)), atol=1e-5)


def test_directions_alone_are_pooled_without_an_encoder():
    saes = [SAE(None, None, sae(seed).parameters) for seed in range(3)]
    pooled = pool(saes)
    assert pooled.sae.variant is None
    assert same_rows(pooled.sae.W_dec, pool([sae(seed) for seed in range(3)], tokens()).sae.W_dec)
    with pytest.raises(UserError, match="a decoder only"):
        pool(saes, tokens())


def test_metadata_names_the_members():
    pooled = pool([sae(0), sae(1, features=12)], tokens())
    told = pooled.stars.metadata()
    assert told["stability"] == pooled.stars.stability.tolist()
    for members, star in zip(told["members"], pooled.stars.members, strict=True):
        assert members == {str(position): feature for position, feature in enumerate(star) if feature >= 0}


def test_what_cannot_be_pooled_is_said():
    wide = SAE(None, None, Parameters(torch.zeros(3, 5), torch.zeros(3), torch.randn(3, 5), torch.zeros(5)))
    other_k = replace(sae(1), k=5)
    for saes, x, words in [
        ([sae(0)], None, "give two or more"),
        ([sae(0), wide], None, "d_in 5, and the first 24"),
        ([sae(0), sae(1, "relu")], tokens(), "is relu, and the first topk with k = 3"),
        ([sae(0), other_k], tokens(), "topk with k = 5, and the first topk with k = 3"),
        ([sae(0), sae(1)], torch.zeros(4, 7), "d_in 7, and the SAEs have 24"),
        ([sae(0), sae(1)], torch.zeros(4, D_IN) - 0, "no feature of any SAE fires"),
    ]:
        with pytest.raises(UserError, match=words):
            pool(saes, x)
    distinct_saes = [
        SAE(None, None, Parameters(torch.zeros(1, 2), torch.zeros(1), row[None], torch.zeros(2))) for row in torch.eye(2)
    ]
    with pytest.raises(UserError, match="no feature is met in 100% of the SAEs"):
        pool(distinct_saes, kind="consensus", quorum=1.0)


def test_what_has_a_threshold_is_brought_to_an_l0_by_it():
    """A Matryoshka SAE as a BatchTopK one of the same weights."""
    weights = sae(0, "batchtopk").parameters
    found = [pooling.calibrated(replace(sae(0, "batchtopk"), variant=kind), tokens(), 2.0) for kind in ("batchtopk", "matryoshka")]
    assert torch.equal(found[0].parameters.threshold, found[1].parameters.threshold)
    assert torch.equal(found[1].parameters.b_enc, weights.b_enc)


def test_an_l0_that_cannot_be_reached_is_said():
    pooled = pool([sae(0, "jumprelu"), sae(1, "jumprelu")], tokens())
    with pytest.raises(UserError, match="at best; pool more features"):
        pooling.calibrated(pooled.sae, tokens(), 19.5)


def test_a_token_on_which_nothing_fires_and_very_few_tokens_are_no_obstacle():
    saes = [sae(seed, "jumprelu") for seed in range(2)]
    silent = torch.cat([tokens(pooling.ROWS), torch.zeros(1, D_IN)])  # the last batch is one silent token
    assert measure(pool(saes, silent).sae, silent).l0 == pytest.approx(measure(saes[0], silent).l0, rel=0.02)
    few = tokens(20)
    pool(saes, few)


def test_stars_are_those_of_the_families_less_what_is_alike():
    saes = [sae(seed, noise=0.3) for seed in range(3)]
    found = unlike(stars(saes, None, 0.7), saes, 0.7, "medoid")
    W_dec = torch.stack([each.W_dec for each in saes])
    rows = W_dec[found.medoid, found.members[np.arange(len(found)), found.medoid]]
    for star, row in zip(found.members, rows, strict=True):
        for position, feature in enumerate(star):
            assert feature < 0 or W_dec[position, feature] @ row > 0.7 - 1e-6
    assert (assembled(saes, found, "medoid").W_dec - rows).abs().max() < 1e-6


# The command


def test_the_pool_of_a_study_is_written_with_what_it_stands_for(quick, call, tmp_path):
    status, out, error = call(
        "pool", "quick", "--out", tmp_path / "pooled", "--kind", "consensus", "--quorum", "0.6", "--tokens", "20000"
    )
    assert status == 0
    assert "about 0.0 GB of memory for 4 SAEs" in error[0]
    written = formats.load(tmp_path / "pooled")
    metadata = read_json(tmp_path / "pooled" / "cfg.json")["metadata"]
    assert f"{len(written.W_dec):,} features" in out
    assert metadata["kind"] == "consensus"
    assert len(metadata["stability"]) == len(metadata["members"]) == len(written.W_dec)
    assert min(map(len, metadata["members"])) == 3  # 60 % of four, and more
    ensemble = ensembles.ensemble(quick.main)
    for feature, members in enumerate(metadata["members"][:20]):
        rows = torch.stack([ensemble.W_dec[int(sae), member] for sae, member in members.items()])
        assert F.cosine_similarity(rows.mean(0), written.W_dec[feature], dim=0) == pytest.approx(1, abs=1e-5)
    formats.save(ensemble.dictionary(0), tmp_path / "single")
    status, _, _ = call("stability", tmp_path / "pooled", tmp_path / "single", "--out", tmp_path / "x.csv")
    assert status == 0


def test_the_pool_of_a_study_can_be_fine_tuned(quick, call, tmp_path):
    written = {}
    for how in ("none", "decoder", "all"):
        assert call("pool", "quick", "--out", tmp_path / how, "--tokens", "20000", "--fine-tune", how)[0] == 0
        written[how] = formats.load(tmp_path / how)
        assert read_json(tmp_path / how / "cfg.json")["metadata"]["fine_tuned"] == how
    x = texts.activations(quick.main, "evaluation").data[:5000].float()
    error = {how: float((each.decode(each.encode(x)) - x).square().sum()) for how, each in written.items()}
    assert error["all"] < error["decoder"] < error["none"]
    assert torch.equal(written["decoder"].encode(x) > 0, written["none"].encode(x) > 0)  # what fires stays


def test_directions_of_files_are_pooled_without_a_text(call, tmp_path):
    paths = [tmp_path / f"sae{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        formats.save(sae(seed), path)
    status, out, _ = call("pool", *paths, "--kind", "union", "--out", tmp_path / "directions.safetensors")
    assert status == 0
    assert f"{FEATURES} features, 100% of which all SAEs have" in out
    written = formats.load(tmp_path / "directions.safetensors")
    assert same_rows(written.W_dec, pool([sae(seed) for seed in range(3)], tokens()).sae.W_dec)
    assert read_metadata(tmp_path / "directions.safetensors")["saes"] == 3


SITE = ("--model", "gpt2", "--corpus", "there.txt", "--hook-name", "blocks.1.hook_resid_post")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch", "--out", "x"), "study: there is no nosuch"),
        (("no/such", "other", "--out", "x.safetensors"), "no/such: no such file or folder"),
        (("a", "b", "c", "--out", "x"), "a: no such file or folder; name SAEs that are there"),
        (("quick", "--out", "x.safetensors"), "--out x.safetensors: name a folder"),
        (("quick", "nosuch", "--out", "x"), "cell: quick has no nosuch; it has topk-256"),
        (("saes/a", "saes/b", "--out", "x"), "--out x: name a .safetensors file, since without a text"),
        (("saes/a", "saes/b", "--out", "x", "--model", "gpt2"), "give all three, or none"),
        (("quick", "--out", "x", "--threshold", "7"), "--threshold 7: no cosine between 0 and 1"),
        (("saes/a", "saes/b", "--out", "x.safetensors", "--fine-tune", "all"), "--fine-tune: it takes the training activations"),
        (("saes/a", "saes/b", "--out", "x.safetensors", "--set", "k=3"), "--set: it overrides keys of a study"),
        (("quick", "--out", "there.txt"), "--out there.txt: {here}/there.txt is a file; name another place"),
        (("quick", "--out", "there.txt/x"), "--out there.txt/x: {here}/there.txt is a file; name another place"),
        (("saes/a", "saes/b", "--out", "d.safetensors"), "--out d.safetensors: {here}/d.safetensors is a folder"),
        (("a.safetensors", "b.safetensors", "--out", "a.safetensors"), "--out a.safetensors: one of the SAEs that are pooled"),
        (("there.txt", "b.safetensors", "--out", ".", *SITE), "--out .: one of the SAEs that are pooled"),
        (("quick", "--out", "x", "--format", "sparsify", "--set", "variant=gated"), "--format sparsify: it has topk only"),
        (("quick", "--out", "x", "--fine-tune", "all", "--set", "stream=true"), "stream: this study keeps no training activations"),
        (("quick", "--out", "x", "--model", "m", "--corpus", "c", "--hook-name", "h"), "--model: a study has a text of its own"),
    ],
)
def test_what_the_command_cannot_do_is_one_line_before_anything_is_computed(call, arguments, words, house, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.safetensors").mkdir()
    for name in ("there.txt", "a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    status, _, error = call("pool", *arguments)
    assert (status, len(error)) == (2, 1)
    assert words.format(here=tmp_path) in error[0]
    assert not house.exists()
