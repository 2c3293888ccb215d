"""C9: what is compared with what, and its rule on planted results."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from sae_stability import evaluation, pipeline
from sae_stability.book import page
from sae_stability.errors import UserError
from sae_stability.experiments import pooling as experiment
from sae_stability.experiments import pools, rivals
from sae_stability.experiments.pooling import (
    CONTROLS,
    EXPLAINED,
    NOISE,
    NOISE_SINGLE,
    RECOVERED,
    SINGLE,
    TUNED,
    judge_c9,
    split,
)
from sae_stability.experiments.rivals import BAGGED, BOOSTED, LONGER, WIDER
from sae_stability.language.activations import Activations
from sae_stability.loading import load_study
from sae_stability.matching import stability
from sae_stability.pooling import Stars, measure
from sae_stability.statistics import bootstrap_ratio, over_pairs
from sae_stability.study import Recipe
from sae_stability.training import shards, train
from sae_stability.training.loop import Training


def test_groups_are_disjoint_and_of_equal_size():
    three = [2, 2, 2]
    for seeds, size, sizes in ((4, None, [2, 2]), (6, None, three), (8, None, three), (11, None, [3, 3, 3]), (96, 8, [8] * 12)):
        for partition in range(5):
            groups = split(seeds, partition, size)
            assert list(map(len, groups)) == sizes
            members = [one for group in groups for one in group]
            assert len(set(members)) == len(members)
            assert set(members) <= set(range(seeds))
    assert split(11, 0) != split(11, 1)


def test_shares_count_live_features_and_weigh_their_energy():
    W_dec = F.normalize(torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    energy = torch.rand(3, 30, generator=torch.Generator().manual_seed(1))
    energy[:, ::7] = 0  # these do not fire
    alike = stability(W_dec, 0.8, energy > 0)
    found = pools.shares(alike, energy, 0.6).set_index(["one", "other"])
    for one, other in permutations(range(3), 2):
        live, there = energy[one] > 0, energy[other] > 0
        best = (W_dec[one, live] @ W_dec[other, there].T).amax(1)
        back = best >= 0.8
        assert found.loc[(one, other), "share"] == pytest.approx(float(back.double().mean()))
        assert found.loc[(one, other), "calibrated"] == pytest.approx(float((best >= 0.6).double().mean()))
        assert found.loc[(one, other), "cosine"] == pytest.approx(float(best.mean()), abs=1e-6)
        weighted = float((energy[one, live] * back).sum() / energy[one, live].sum())
        assert found.loc[(one, other), "weighted"] == pytest.approx(weighted, abs=1e-6)
    assert pools.shares(alike, energy, np.nan)["calibrated"].isna().all()


def small_seeds(variant: str = "topk", **changes) -> tuple[pools.Seeds, Recipe]:
    """Four trained SAEs of 32 features, in two groups."""
    size = {"d_sae": 32, "k": 3, "tokens": 6000, "batch": 200, "encoder": "float32", "dead_after": 10**6}
    recipe = Recipe(model="none", hook_name="blocks.0.hook_resid_post", variant=variant, **size | changes)
    x = Activations.of(torch.randn(6000, 16, generator=torch.Generator().manual_seed(0)))
    return pools.Seeds.of(train(recipe, x, range(4)), x, 0.7), recipe


def test_what_comes_back_in_single_saes_of_other_groups_and_what_has_no_place():
    seeds, _ = small_seeds()
    product = seeds.means()
    energy = torch.stack([measure(product.dictionary(one), seeds.train.data).energy for one in range(2)])
    found = pools.in_singles(product.W_dec, energy, seeds)
    assert np.isnan(np.diag(found)).all()
    lost = pools.lost(product.W_dec, energy > 0, seeds).set_index(["group", "seed"])
    assert list(lost.index) == [(number, one) for number, group in enumerate(seeds.groups) for one in group]
    for pool, other in ((0, 1), (1, 0)):
        kept = F.normalize(product.W_dec[pool], dim=1)[energy[pool] > 0]
        back = []
        for one in seeds.groups[other]:
            directions = seeds.saes[one].directions[seeds.energy[one] > 0]
            back.append(((kept @ F.normalize(directions, dim=1).T).amax(1) >= 0.7).double().mean())
        assert found[pool, other] == pytest.approx(float(np.mean(back)))
        for one in seeds.groups[pool]:
            rows, weight = F.normalize(seeds.saes[one].directions, dim=1), seeds.energy[one]
            away = (weight > 0) & ((rows @ kept.T).amax(1) < 0.7)
            elsewhere = []
            for t in seeds.groups[other]:
                theirs = F.normalize(seeds.saes[t].directions, dim=1)[seeds.energy[t] > 0]
                elsewhere.append((rows[away] @ theirs.T).amax(1) >= 0.7)
            row = lost.loc[(pool, one)]
            assert row["share"] == pytest.approx(float(away.sum() / (weight > 0).sum()))
            assert row["energy"] == pytest.approx(float(weight[away].sum() / weight.sum()))
            assert row["back"] == pytest.approx(float(torch.stack(elsewhere).double().mean()))


def test_only_directions_move_where_the_decoder_alone_is_fine_tuned():
    seeds, recipe = small_seeds()
    before = seeds.means()
    after = pools.fine_tuned(before, recipe, seeds, "cpu", decoder_alone=True)
    for name, tensor in before.parameters._asdict().items():
        unchanged = torch.allclose(tensor, getattr(after.parameters, name), atol=1e-5)
        assert unchanged == (name != "W_dec"), name


def test_many_pools_are_fine_tuned_on_tokens_that_are_there(monkeypatch):
    seeds, recipe = small_seeds()
    read = []
    monkeypatch.setattr(pools, "finetune", lambda start, short, train, *_: read.append(train.data) or start)
    many = pools.joined([seeds.saes[0]] * 24, seeds.ensemble)  # a tenth of the tokens each
    pools.fine_tuned(many, recipe, seeds, "cpu")
    read.sort(key=torch.Tensor.data_ptr)  # several are trained at a time
    assert [len(data) for data in read] == [600] * 24
    assert torch.equal(read[0], seeds.train.data[:600])
    assert torch.equal(read[-1], seeds.train.data[-600:])
    read.clear()
    pools.fine_tuned(pools.joined(seeds.saes[:3], seeds.ensemble), recipe, seeds, "cpu")
    assert len(torch.cat(read).unique(dim=0)) == 1800  # three read different ones


def test_all_partitions_have_as_many_groups():
    seeds, recipe = small_seeds()
    seeds = pools.Seeds.of(train(recipe, seeds.train, range(8)), seeds.train, 0.7)
    assert len(seeds.groups) == 3
    for partition in (1, 2):
        for found in seeds.pools(partition, np.nan):
            assert found["one"].max() == 2


def test_sums_of_saes_rebuild_by_their_mean_or_one_after_another():
    seeds, recipe = small_seeds()
    x = seeds.train.data[:500]

    def rebuilt(sae, x):
        return sae.decode(sae.encode(x))

    bagged = rivals.bagged(seeds)
    assert len(bagged) == 2
    for group, chain in zip(seeds.groups, bagged, strict=True):
        expected = torch.stack([rebuilt(seeds.saes[one], x) for one in group]).mean(0)
        torch.testing.assert_close(chain.rebuild(x)[1], expected)
    boosted = rivals.boosted(seeds, recipe)
    for group, chain in zip(seeds.groups, boosted, strict=True):
        first, second = chain.saes
        assert first is seeds.saes[group[0]]
        left = seeds.train.data - rebuilt(first, seeds.train.data)
        alone = train(recipe, Activations.of(left), [seeds.ensemble.seeds[group[1]]]).dictionary(0)
        torch.testing.assert_close(second.W_dec, alone.W_dec, atol=1e-4, rtol=1e-4)
        expected = rebuilt(first, x) + rebuilt(second, x - rebuilt(first, x))
        torch.testing.assert_close(chain.rebuild(x)[1], expected)
    cluster = np.arange(500) // 50
    held_out = seeds.train.first(500)
    fit = rivals.fit(boosted, held_out, cluster, seeds.ensemble)
    alone = rivals.fit([rivals.Sum(chain.saes[:1], boosted=True) for chain in boosted], held_out, cluster, seeds.ensemble)
    plain = evaluation.fit(seeds.ensemble, held_out, cluster)
    heads = [group[0] for group in seeds.groups]
    np.testing.assert_allclose(alone.residual, plain.residual[heads], rtol=1e-3)  # a chain of one is the SAE
    assert (alone.total == plain.total).all()
    assert torch.equal(alone.firings, plain.firings[heads])
    error = (x - boosted[0].rebuild(x)[1]).square().sum() * seeds.ensemble.scale**2
    assert fit.residual[0].sum() == pytest.approx(float(error), rel=1e-4)
    assert fit.residual.sum() < alone.residual.sum()  # what is left is explained in part
    first, second = boosted[0].saes
    left = x - rebuilt(first, x)
    reads = [(first, x), (second, left)]
    assert torch.allclose(boosted[0].energy(x), torch.cat([measure(sae, read).energy for sae, read in reads]))
    assert torch.equal(fit.firings[0], torch.cat([measure(sae, read).firings for sae, read in reads]))
    both = [measure(sae, x).energy for sae in bagged[0].saes]
    assert torch.equal(bagged[0].energy(x), torch.cat(both))


def test_what_costs_as_much_is_kept_as_it_is_trained(tmp_path, monkeypatch):
    seeds, recipe = small_seeds()

    def rivals_of(folder=None) -> list[torch.Tensor]:
        longer, wider = rivals.trained(seeds, recipe, 32, folder=folder).values()
        return [longer.W_dec, wider.W_dec, *(chain.directions for chain in rivals.boosted(seeds, recipe, folder=folder))]

    undisturbed, begun, left = rivals_of(), [], [0]

    def killed(*inputs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return train(*inputs)

    class Counted(Training):
        def __init__(self, recipe, seeds, coefficients, visits, d_in, folder, *more):
            begun.append(folder.relative_to(tmp_path).parts[0])
            super().__init__(recipe, seeds, coefficients, visits, d_in, folder, *more)

    monkeypatch.setattr(rivals.training, "train", killed)
    monkeypatch.setattr(shards, "Training", Counted)
    for left[0] in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            rivals_of(tmp_path)
    left[0] = 4
    for again, before in zip(rivals_of(tmp_path), undisturbed, strict=True):
        assert torch.equal(again, before)
    assert sorted(begun) == sorted(["longer", "wider", *(f"boosted-{seeds.ensemble.seeds[group[1]]}" for group in seeds.groups)])


def test_how_much_more_of_pools_comes_back_in_single_saes_is_paired_by_group():
    found = planted(SHARES, LOST)
    assert found.more_in_singles().value == pytest.approx(0.25, abs=0.01)
    assert np.isnan(np.diag(found.in_singles(SINGLE))).all()


def planted(shares: dict[str, float], lost: dict[str, float]) -> experiment._Judged:
    """Eleven single SAEs and products of three SAEs each with known shares, and known parts of the variance and of the loss that
    they miss."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "product": name,
            "partition": partition,
            "one": one,
            "other": other,
            "share": share + 0.001 * rng.normal(),
            "weighted": share,
        }
        for name, share in shares.items()
        for partition in range(1 if name == SINGLE else 2)
        for one, other in permutations(range(11 if name == SINGLE else 3), 2)
    ]
    total, arrays = 1 + rng.random(50), {}
    for name, part in lost.items():
        noise = 1 + 0.01 * rng.normal(size=(11 if name == SINGLE else 3, 50))
        arrays |= {
            f"{name}/residual": part * total * noise,
            f"{name}/spliced": 2 + part * noise,
            f"{name}/firings": np.ones((len(noise), 8)),
        }
    arrays |= {"total": total, "clean": np.full(50, 2.0), "zero": np.full(50, 3.0), "rows": np.array(10)}
    arrays["in singles"] = np.where(np.eye(3) == 1, np.nan, shares[TUNED] - 0.05)
    return experiment._Judged(pd.DataFrame(rows), features(shares), arrays, pd.DataFrame(), split(11, 0), 2)


def features(shares: dict[str, float]) -> pd.DataFrame:
    """Features that come back the more often the stronger they are, and in pools by the difference of the shares more often."""
    rng, parts = np.random.default_rng(1), []
    for name, saes in ((TUNED, 3), (SINGLE, 11)):
        for one in range(saes):
            energy = np.exp(rng.normal(1.0 if name == TUNED else 0.0, 1.0, 300))
            back = 0.3 + 0.05 * np.log(energy) + (shares[TUNED] - shares[SINGLE]) * (name == TUNED)
            parts.append(pd.DataFrame({"product": name, "one": one, "energy": energy, "frequency": energy, "back": back}))
    return pd.concat(parts)


SHARES = {SINGLE: 0.5, TUNED: 0.8, NOISE: 0.02, NOISE_SINGLE: 0.01} | dict.fromkeys(CONTROLS, 0.6)
LOST = {SINGLE: 0.14, TUNED: 0.145} | dict.fromkeys(CONTROLS, 0.145)


def test_a_pool_that_is_more_stable_and_as_good_is_supported():
    stated, beyond_noise, beyond_energy = judge_c9(planted(SHARES, LOST))
    assert [line["verdict"] for line in (stated, beyond_noise, beyond_energy)] == ["supported"] * 3
    assert stated["value"] == pytest.approx(0.3, abs=0.01)
    assert stated["null"] == pytest.approx(0.01, abs=0.005)
    assert beyond_noise["value"] == pytest.approx(0.2, abs=0.01)
    assert beyond_energy["value"] == pytest.approx(0.3, abs=0.01)  # what pools owe to stronger features is taken off


def test_a_pool_of_stronger_features_that_come_back_for_it_is_no_more_stable_at_equal_energy():
    found = planted(SHARES | {TUNED: 0.5}, LOST)
    raw = found.features.groupby("product")["back"].mean()
    assert raw[TUNED] > raw[SINGLE] + 0.03
    assert found.matched().value == pytest.approx(0, abs=0.01)


def test_pools_and_controls_of_the_same_groups_are_paired():
    found = planted(SHARES, LOST)
    of_group = np.array([0.0, 0.1, 0.2])  # some groups are more alike than others, whatever is made of them
    ours = found.pairs["product"] != SINGLE
    moved = found.pairs.assign(share=found.pairs["share"].where(~ours, found.pairs["share"] + of_group[found.pairs["one"] % 3]))
    paired = replace(found, pairs=moved).more(LONGER)
    assert paired.value == pytest.approx(0.2, abs=0.01)
    assert paired.high - paired.low < 0.02


def test_what_a_pool_loses_and_what_longer_training_wins_turn_the_verdict():
    worse = judge_c9(planted(SHARES, LOST | {TUNED: 0.2}))
    assert worse[0]["verdict"] == "weaker than the bound"
    assert worse[1]["verdict"] == "weaker than the bound"  # it explains less than what costs as much, too
    longer = judge_c9(planted(SHARES | {LONGER: 0.9}, LOST))
    assert longer[0]["verdict"] == "supported"
    assert longer[1]["verdict"] == "opposite"
    assert longer[1]["value"] == pytest.approx(-0.1, abs=0.01)
    without_noise = planted({name: share for name, share in SHARES.items() if "surrogate" not in name}, LOST)
    assert judge_c9(without_noise)[0]["null"] is None


def test_quality_is_what_is_not_lost_and_its_difference_is_paired_by_text():
    found = planted(SHARES, LOST)
    lost, total = found.arrays[f"{TUNED}/residual"], found.arrays["total"]
    assert found.quality(TUNED).value == pytest.approx(1 - lost.sum() / total.sum() / 3)
    less = found.quality(TUNED, EXPLAINED, SINGLE)
    assert less.value == pytest.approx(-0.005, abs=1e-3)
    assert less.low < less.value < less.high
    recovered = (found.arrays["zero"] - found.arrays[f"{TUNED}/spliced"]).sum(1) / 50
    assert found.quality(TUNED, RECOVERED).value == pytest.approx(recovered.mean())
    of_text = bootstrap_ratio(lost.mean(0) - found.arrays[f"{SINGLE}/residual"].mean(0), total)
    assert less.high - less.low >= of_text.high - of_text.low


def test_a_share_is_averaged_over_partitions():
    found = planted(SHARES, LOST)
    intervals = []
    for _, rows in found.pairs[found.pairs["product"] == TUNED].groupby("partition"):
        values = np.full((3, 3), np.nan)
        values[rows["one"], rows["other"]] = rows["share"]
        intervals.append(over_pairs(values))
    share = found.share(TUNED)
    assert share.value == pytest.approx(np.mean([each.value for each in intervals]))
    assert share.high == pytest.approx(np.mean([each.high for each in intervals]))


def test_the_price_of_a_product_is_that_of_its_seeds_and_its_fine_tuning():
    found = planted(SHARES, LOST)
    assert found.trained(SINGLE) == 1
    assert found.trained(pools.MEANS) == found.trained(LONGER) == 3
    assert found.trained(TUNED) == found.trained(WIDER) == pytest.approx(3.1)
    assert found.trained(BAGGED) == found.trained(BOOSTED) == 3
    assert found.trained(pools.TUNED_SINGLE) == pytest.approx(1.1)
    assert found.trained(NOISE) == 2  # of five seeds


def test_random_features_are_those_of_the_seeds_and_not_of_the_stars():
    size = np.repeat([1, 3], 500)
    members = np.where(np.arange(3) < size[:, None], 0, -1)
    found = Stars(members, np.zeros(1000, dtype=int), np.zeros(1000))
    drawn = np.concatenate([found.size[pools.random_features(found, 20, number)] for number in range(200)])
    assert (drawn == 3).mean() == pytest.approx(0.75, abs=0.03)


def test_a_study_judges_c9(house, small):
    study = load_study("embedded", [*small, "seeds=6", "experiments=[pooling]"], name="pools")
    pipeline.compute(study)
    found = page.open_study(study.name)
    table = found.table("pools").set_index("product")
    assert {pools.TUNED_SINGLE, pools.RANDOM} <= set(table.index)
    assert not {LONGER, WIDER} & set(table.index)  # nobody asked for them
    judged = table.dropna(subset=["explained"])
    assert judged["features"].nunique() == 1  # equal widths
    assert judged.loc[SINGLE, "saes"] == 6
    assert (judged.drop(SINGLE)["saes"] == 3).all()
    assert judged["l0"].between(0.97 * table.loc[SINGLE, "l0"], 1.03 * table.loc[SINGLE, "l0"]).all()
    assert table.loc[TUNED, "explained"] > table.loc[pools.MEANS, "explained"]
    assert [line["line"] for line in found.ledger if line["id"] == "C9"] == ["as stated", "beyond energy and frequency"]


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_what_costs_as_much_is_trained_for_each_group(variant):
    seeds, recipe = small_seeds(variant)
    found = pools.compared(seeds, recipe)
    width = found[TUNED].d_sae
    found |= rivals.trained(seeds, recipe, width)
    assert set(found) == {pools.MEDOIDS, pools.MEANS, pools.DECODER, TUNED, pools.TUNED_MEDOIDS, *CONTROLS}
    assert {product.d_sae for name, product in found.items() if name not in (LONGER, pools.TUNED_SINGLE)} == {width}
    groups = split(4, 0)
    heads = [seeds.ensemble.seeds[group[0]] for group in groups]
    twice = train(recipe.model_copy(update={"passes": 2}), seeds.train, heads)
    assert torch.equal(found[LONGER].W_dec, twice.W_dec)
    wide = train(recipe.model_copy(update={"d_sae": 64}), seeds.train, [groups[0][0]])
    energy = measure(wide.dictionary(0), seeds.train.data).energy
    pruned = rivals.pruned(wide, 32, seeds)
    assert torch.equal(pruned.W_dec[0], wide.W_dec[0][energy.topk(32).indices.sort().values])


def test_a_study_judges_what_costs_as_much_too(house, small):
    overrides = [*small, "seeds=6", "pool_size=2", "pool_controls=true", "experiments=[pooling]"]
    study = load_study("embedded", overrides, name="pool-controls")
    pipeline.compute(study)
    found = page.open_study(study.name)
    table = found.table("pools").set_index("product")
    assert {*CONTROLS, BAGGED, BOOSTED} <= set(table.index)
    assert table.loc[BAGGED, "features"] == 2 * table.loc[SINGLE, "features"]
    assert table.loc[BAGGED, "l0"] == pytest.approx(2 * table.loc[SINGLE, "l0"], rel=0.05)
    assert table.loc[BOOSTED, "explained"] > table.loc[SINGLE, "explained"]
    assert table.loc[[SINGLE, TUNED], ["impact", "surface", "in_singles"]].notna().all(axis=None)
    assert table["cosine"].between(0, 1).all()
    (lost,) = found.table("lost_by_pools").to_dict("records")
    assert 0 <= lost["energy"] < lost["share"] < 1
    assert [line["line"] for line in found.ledger if line["id"] == "C9"] == [
        "as stated",
        "beyond size and noise",
        "beyond energy and frequency",
    ]


def test_pools_that_are_too_large_for_the_seeds_are_refused():
    with pytest.raises(UserError, match="pool_size: three pools of 4 need 12 seeds"):
        load_study("quick", ["seeds=11", "pool_size=4"], name="large-pools")
