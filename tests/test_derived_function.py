"""What the chapters on function and triggers derive from tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from sae_stability.ablation.controls import ORDERS, SHARES
from sae_stability.book import derived
from sae_stability.matching import BANDS, Banding, Stability

SETS = ("band", "random", "paired", "matched", "paired less matched")


def removals_table(kinds=("real", "surrogate"), measures=("reconstruction", "prediction")) -> pd.DataFrame:
    """A table `removals` in which every estimate has another value, that says of what it is."""
    rows = []
    for kind in kinds:
        for measure in measures:
            names = [(reading, members, band) for reading in ("removed", "spliced") for members in SETS for band in BANDS]
            names += [
                (reading, f"by {order}", str(share)) for reading in ("kept", "removed") for order in ORDERS for share in SHARES
            ]
            names += [("removed", "all", "")]
            rows += [{"kind": kind, "measure": measure, "reading": reading, "set": of, "of": which} for reading, of, which in names]
    table = pd.DataFrame(rows)
    for number, column in enumerate(["share", "share_low", "share_high", "change", "change_low", "change_high"]):
        table[column] = np.arange(len(table)) + number / 10
    return table.sample(frac=1, random_state=0)


def sets_table() -> pd.DataFrame:
    rows = {
        "kind": ["real", "real", "real", "real", "real", "real", "surrogate"],
        "band": ["unstable", "stable", "unstable", "stable", "intermediate", "unstable", "unstable"],
        "seed": [0, 0, 1, 1, 0, 2, 0],
        "share": [0.6, 0.1, 1.0, 0.3, 0.3, 0.2, 1.0],
        "energy_share": [0.5, 0.2, 0.5, 0.4, 0.3, 0.5, 1.0],
        "support": [0.5, np.nan, 0.6, 0.4, 0.0, 1.0, 0.9],
        "energy_ratio": [1.0, np.nan, 1.01, 0.99, np.nan, 1.0, 1.0],
    }
    return pd.DataFrame(rows)


def test_removals_stand_side_by_side_with_their_own_intervals():
    table = removals_table()
    names = {"explained": ("reconstruction", "removed", "band"), "spliced": ("prediction", "spliced", "random")}
    side = derived.side_by_side(table, names, "surrogate")
    assert list(side["band"]) == list(BANDS)
    by_name = table[table["kind"] == "surrogate"].set_index(["measure", "reading", "set", "of"])
    for row in side.to_dict("records"):
        for name, removal in names.items():
            wanted = by_name.loc[(*removal, row["band"])]
            for column in ("share", "share_low", "share_high", "change", "change_low", "change_high"):
                assert row[f"{name}_{column}"] == wanted[column]
    assert side["explained_share"].dtype == float


def test_band_sizes_are_means_over_the_seeds_that_have_them():
    sizes = derived.band_sizes(sets_table())
    assert list(sizes.index) == list(BANDS)
    assert sizes["share"].to_list() == pytest.approx([0.2, 0.3, 0.6])
    assert sizes["support"].to_list() == pytest.approx([0.4, 0.0, 0.7])
    assert derived.band_sizes(sets_table(), "surrogate").loc["stable"].isna().all()


def test_only_bands_with_matches_are_compared_with_them():
    table = removals_table()
    compared = derived.matched_comparisons(table, sets_table(), ["prediction", "reconstruction"])
    assert list(zip(compared["measure"], compared["band"], strict=True)) == [
        ("prediction", "stable"),
        ("prediction", "unstable"),
        ("reconstruction", "stable"),
        ("reconstruction", "unstable"),
    ]
    last = compared.iloc[-1]
    assert last["support"] == pytest.approx(0.7)
    real = table[(table["kind"] == "real") & (table["measure"] == "reconstruction") & (table["reading"] == "removed")]
    unstable = real[real["of"] == "unstable"].set_index("set")["share_low"]
    assert last["paired_share_low"] == unstable["paired"]
    assert last["matched_share_low"] == unstable["matched"]
    assert last["difference_share_low"] == unstable["paired less matched"]


def test_curves_run_from_nothing_to_everything():
    table = removals_table()
    curves = derived.kept_by_order(table, ["prediction"])
    assert set(curves["measure"]) == {"prediction"}
    assert len(curves) == len(ORDERS) * (len(SHARES) + 2)
    for order, curve in curves.sort_values("added").groupby("order"):
        assert curve["added"].to_list() == [0, *SHARES, 1]
        assert curve.iloc[0][["share", "share_low", "share_high"]].to_list() == [0, 0, 0]
        assert curve.iloc[-1][["share", "share_low", "share_high"]].to_list() == [1, 1, 1]
        wanted = table.query(
            "kind == 'real' and measure == 'prediction' and reading == 'kept' and set == @name and of == '0.5'",
            local_dict={"name": f"by {order}"},
        )
        assert curve.iloc[2]["share"] == wanted["share"].item()


def test_rank_correlations_are_spearmans_by_seed():
    rng = np.random.default_rng(0)
    features = pd.DataFrame({"seed": np.repeat([3, 9], 30), "stability": rng.integers(0, 4, 60), "impact": rng.normal(size=60)})
    by_seed = [stats.spearmanr(part["stability"], part["impact"]).statistic for _, part in features.groupby("seed")]
    assert derived.rank_correlations(features, "stability", ["impact"])["impact"] == pytest.approx(np.mean(by_seed))


def test_a_seed_whose_features_are_all_alike_has_no_part_in_rank_correlations():
    features = pd.DataFrame({"seed": [0, 0, 0, 1, 1, 1], "stability": [0, 0, 0, 1, 2, 3], "impact": [1, 2, 3, 3, 2, 1]})
    assert derived.rank_correlations(features, "stability", ["impact"])["impact"] == pytest.approx(-1)
    assert np.isnan(derived.rank_correlations(features[:3], "stability", ["impact"])["impact"])


def test_errors_of_either_order_are_shares_of_the_true_changes():
    sample = pd.DataFrame({"first_order": [0.0, 0.0, 1.0], "second_order": [1.0, -2.0, 3.0], "true": [2.0, -2.0, 4.0]})
    errors = derived.order_errors(sample)
    assert errors.loc["first_order", "error"] == pytest.approx(7 / 8)
    assert errors.loc["second_order", "error"] == pytest.approx(2 / 8)
    assert errors.loc["second_order", "rank_correlation"] == pytest.approx(1)
    assert errors.loc["first_order", "rank_correlation"] == pytest.approx(stats.spearmanr([0, 0, 1], [2, -2, 4]).statistic)


def test_shares_of_a_band_add_up_and_names_that_nothing_has_are_zero():
    features = pd.DataFrame({"band": ["unstable"] * 4 + ["stable"], "fate": ["split", "split", "missing", "rotated", "rotated"]})
    shares = derived.shares_by_band(features, "fate", ("rotated", "split", "merged", "missing"))
    assert list(shares.index) == ["stable", "unstable"]
    assert shares.loc["unstable"].to_list() == [0.25, 0.5, 0, 0.25]
    assert shares.loc["stable"].to_list() == [1, 0, 0, 0]


def explanations_table() -> pd.DataFrame:
    columns = ["seed", "engine", "band", "feature", "text", "f1", "precision", "recall", "balanced_accuracy", "surface"]
    rows = [
        (3, "rules", "unstable", 1, "two words", 0.2, 0.5, 0.1, 0.4, True),
        (3, "rules", "unstable", 2, "the word 'of'", 0.6, 0.7, 0.3, 0.5, True),
        (3, "rules", "stable", 3, "a", 0.9, 1.0, 0.9, 0.9, False),
        (5, "rules", "stable", 4, "a b c", 0.5, 0.2, 0.7, 0.8, True),
        (5, "rules", "unstable", 5, "one", 0.7, 0.4, 0.2, 0.3, False),
        (7, "rules", "unstable", 6, "one", 0.0, 0.4, 0.2, 0.3, False),
        (3, "a model", "intermediate", 7, "one", 0.4, 0.4, 0.2, 0.3, False),
    ]
    return pd.DataFrame(rows, columns=columns)


def test_explanations_are_scored_by_engine_and_band():
    scores = derived.explanation_scores(explanations_table())
    assert list(zip(scores["engine"], scores["band"], strict=True)) == [
        ("rules", "stable"),
        ("rules", "unstable"),
        ("a model", "intermediate"),
    ]
    stable = scores.iloc[0]
    assert stable["features"] == 2
    means = stable[["f1", "precision", "recall", "balanced_accuracy", "surface"]].to_list()
    assert means == pytest.approx([0.7, 0.6, 0.8, 0.85, 0.5])


def test_the_difference_of_f1_is_the_mean_over_seeds_that_have_both_bands():
    matched = np.zeros((3, 3, 7), dtype=bool)
    matched[0, :, 3] = matched[1, :, 4] = True
    best = torch.from_numpy(np.where(np.eye(3, dtype=bool)[:, :, None], np.nan, matched.astype(np.float32)))
    found = Stability(best, best.long(), best, torch.ones(3, 7, dtype=torch.bool), 0.7)
    rules = explanations_table().query("engine == 'rules'")
    difference = derived.f1_difference(rules, Banding(found, [3, 5, 7]))
    assert difference.value == pytest.approx(np.mean([0.4 - 0.9, 0.7 - 0.5]))
    assert difference.low < difference.value < difference.high
    assert np.isnan(derived.f1_difference(rules.query("band == 'unstable'"), Banding(found, [3, 5, 7])).value)


@pytest.mark.parametrize(("features", "wanted"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [0, 3, 6])])
def test_the_best_the_middle_and_the_worst_are_shown_once_each(features, wanted):
    scores = np.linspace(1, 0, features)
    order = np.random.default_rng(0).permutation(features)
    table = pd.DataFrame({"band": "unstable", "feature": order, "f1": scores[order]})
    assert derived.best_middle_worst(table)["feature"].to_list() == wanted
