"""Tables of the quick study against the results that they are made of, and definitions against brute force."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import drawn
from sae_stability.book import page
from sae_stability.experiments import ensembles, families, matching, quality, stability
from sae_stability.experiments.explanations import judge_c6
from sae_stability.matching import Banding, Stability, calibrate, mcc, mean_at, mean_mcc
from sae_stability.matching import stability as compare
from sae_stability.matching.criteria import one_to_one


def test_the_mean_mcc_is_that_of_each_pair_of_seeds():
    W_dec = drawn(3, 7, 5)
    paired = one_to_one(W_dec, 0.7, torch.ones(3, 7, dtype=torch.bool))
    pairs = [mcc(W_dec[s], W_dec[t]) for s, t in itertools.combinations(range(3), 2)]
    assert mean_mcc(paired).value == pytest.approx(np.mean(pairs), abs=1e-6)


def test_without_a_calibrated_threshold_there_is_no_mean_stability_at_it():
    noise = compare(drawn(3, 7, 5))
    for kind in ("real", "surrogate", "whitened"):
        columns = stability.calibrated_columns(noise, calibrate(noise, noise, 0.05), kind)
        assert np.isnan(list(columns.values())).all()


def test_an_interval_at_the_calibrated_threshold_counts_the_seeds_of_a_further_null_too():
    real, surrogate, null = (
        compare(drawn(30, 6) + scale * drawn(4, 30, 6, seed=seed)) for seed, scale in ((1, 0.3), (2, 3), (3, 0.6))
    )
    calibration = calibrate(real, surrogate, 0.3)
    found = stability.calibrated_columns(null, calibration, "whitened")
    own = null.at(calibration.threshold).mean()
    moved = calibration.interval(lambda at, *_: mean_at(null, at, [0, 1, 2, 3]))
    assert found["mean_stability_calibrated"] == pytest.approx(own.value)
    reach = np.hypot((own.high - own.low) / 2, (moved.high - moved.low) / 2)
    assert found["mean_stability_calibrated_low"] == pytest.approx(own.value - reach)
    assert moved.high - moved.low > 0


def test_thresholds_growth_and_seeds_end_where_the_cell_is(quick):
    row, threshold = quick.row, quick.cell.threshold
    curve = quick.table("thresholds")
    at = curve[(curve["kind"] == "real") & np.isclose(curve["threshold"], threshold)].iloc[0]
    assert at["mean_stability"] == pytest.approx(row["mean_stability"])
    rising = curve[curve["kind"] == "real"].sort_values("threshold")["mean_stability"]
    assert rising.is_monotonic_decreasing
    random = curve[np.isclose(curve["threshold"], threshold)].set_index("kind")["mean_stability"]
    assert random["random directions"] < random["real"]
    growth = quick.table("growth").query("kind == 'real'").sort_values("tokens")
    assert growth["tokens"].iloc[-1] == quick.cell.tokens * quick.cell.passes
    assert growth["mean_stability"].iloc[-1] == pytest.approx(row["mean_stability"])
    first = ensembles.snapshots(quick.main, "real")[growth["tokens"].iloc[0]]
    early = compare(first, threshold, quality.alive(quick.main))
    assert growth["mean_stability"].iloc[0] == pytest.approx(early.mean().value)
    seeds = quick.table("seeds").set_index("seeds")
    assert list(seeds.index) == [3, 4]
    assert seeds.loc[4, "stable_share"] == pytest.approx(row["stable_share"])
    kept = [matching.stability(quick.main).among(list(of)).shares()["stable"].value for of in itertools.combinations(range(4), 3)]
    assert min(kept) <= seeds.loc[3, "stable_share"] <= max(kept)


def test_matches_are_compared_in_studies_of_equal_size(quick):
    table = stability.at_equal_seeds(quick.main, quick.cell.threshold)
    smallest = min(len(ensembles.ensemble(quick.main, kind).seeds) for kind in quick.cell.kinds)
    assert set(table["trials"]) == {smallest - 1}
    real = matching.stability(quick.main).among(list(range(smallest)))
    mean = table.loc[table["kind"] == "real", "matches"].mean() / (smallest - 1)
    assert mean == pytest.approx(real.counts[real.alive].double().mean().item() / (smallest - 1))
    counts = quick.table("counts")
    of_real = counts[counts["kind"] == "real"]
    assert of_real["features"].sum() == real.alive.sum()
    assert (of_real["features"] * of_real["matches"]).sum() == real.counts[real.alive].sum()


def test_a_smaller_study_is_off_by_what_the_other_seeds_say(monkeypatch):
    W = drawn(6, 4, 30)
    W[1:3, 0] = W[0, 0]  # one feature that the first three seeds share, and the others do not have
    found = compare(W, 0.9)
    assert np.isnan(stability.error_of_p(found, [0, 1, 2]))  # too few are outside
    monkeypatch.setattr(stability, "OUTSIDE", 3)
    assert stability.error_of_p(found, [0, 1, 2]) == pytest.approx(
        np.sqrt(1 / 4)
    )  # of four features one has p = 1 here and 0 there
    assert stability.error_of_p(found, [3, 4, 5]) == 0


def test_the_error_of_p_is_that_of_binomial_counts_however_many_seeds_are_outside():
    rng, seeds, features = np.random.default_rng(0), 60, 400
    probability = rng.beta(0.5, 0.5, features)
    matches = torch.from_numpy(rng.random((seeds, seeds, features)) < probability)
    cosines = torch.where(matches, 1.0, 0.0)
    cosines[torch.arange(seeds), torch.arange(seeds)] = torch.nan
    found = Stability(cosines, torch.zeros_like(cosines).long(), cosines * 0, torch.ones(seeds, features, dtype=torch.bool), 0.7)
    for few in (5, 11, 21, 40):
        expected = np.sqrt((probability * (1 - probability)).mean() / (few - 1))
        assert stability.error_of_p(found, list(range(few))) == pytest.approx(expected, rel=0.05)


def test_the_row_of_a_cell_says_what_was_trained_and_found(quick):
    row, cell = quick.row, quick.cell
    assert (row["variant"], row["d_sae"], row["k"], row["seeds"]) == (cell.variant, cell.d_sae, cell.k, len(cell.seed_list))
    assert row["mcc"] == pytest.approx(mean_mcc(matching.stability(quick.main, "real", "one-to-one")).value)
    criteria = quick.table("criteria").set_index(["kind", "criterion"])
    assert criteria.loc[("real", "decoder"), "mean_stability"] == pytest.approx(row["mean_stability"])
    assert criteria.loc[("real", "decoder"), "same_band"] == 1
    for column in ("calibrated_threshold", "mean_stability_calibrated"):
        assert criteria.loc[("real", "decoder"), column] == pytest.approx(row[column], nan_ok=True)
    assert row["explained_variance"] == pytest.approx(quick.table("saes")["explained_variance"].mean(), abs=1e-3)
    unique = quick.table("unique").query("kind == 'real'").set_index("seeds")["families"]
    assert unique.iloc[-1] == pytest.approx(len(families.families(quick.main).size))


def test_each_sae_has_the_mean_stability_of_its_live_features(quick):
    saes, matched = quick.table("saes").set_index("seed"), matching.stability(quick.main)
    for position, seed in enumerate(ensembles.ensemble(quick.main).seeds):
        expected = matched.probability[position].nanmean().item()
        assert saes.loc[seed, "mean_stability"] == pytest.approx(expected, abs=1e-6)


def explained(unstable: float, stable: float, engine: str = "model", told: float = 0.8) -> tuple[pd.DataFrame, Banding]:
    """Explanations of twenty features of each band of five seeds, of which about the given shares are of surface form.

    `told` is how well they tell where features fire.
    """
    bands = ("unstable", "stable", "intermediate")
    rows = [
        {
            "seed": seed,
            "feature": 20 * number + place,
            "engine": engine,
            "band": band,
            "surface": place < round(20 * share) + seed % 2,
            "balanced_accuracy": told + 0.01 * (seed - 2),
        }
        for seed in range(5)
        for number, (band, share) in enumerate(zip(bands, (unstable, stable, 0.5), strict=True))
        for place in range(20)
    ]
    matched = np.zeros((5, 5, 60), dtype=bool)
    matched[:, :, 20:40] = True
    matched[:, ::2, 40:] = True
    best = torch.from_numpy(np.where(np.eye(5, dtype=bool)[:, :, None], np.nan, matched.astype(np.float32)))
    found = Stability(best, best.long(), best, torch.ones(5, 60, dtype=torch.bool), 0.7)
    return pd.DataFrame(rows), Banding(found, list(range(5)))


def test_c6_asks_for_most_unstable_features_and_more_of_them_than_of_stable_ones():
    (supported,) = judge_c6(*explained(unstable=0.8, stable=0.2))
    assert supported["verdict"] == "supported"
    assert supported["value"] == pytest.approx(0.82, abs=0.01)
    assert supported["null"] == pytest.approx(0.22, abs=0.01)
    assert judge_c6(*explained(unstable=0.2, stable=0.8))[0]["verdict"] == "opposite"  # the bands swapped
    assert judge_c6(*explained(unstable=0.7, stable=0.9))[0]["verdict"] == "opposite"  # most, but fewer than of stable ones
    assert judge_c6(*explained(unstable=0.3, stable=0.1))[0]["verdict"] == "weaker than the bound"
    assert judge_c6(*explained(0.8, 0.2, engine="rules")) == []  # an engine that knows nothing but the surface tests nothing


def test_c6_is_not_tested_by_explanations_that_tell_nothing_of_where_features_fire():
    (line,) = judge_c6(*explained(unstable=0.8, stable=0.2, told=0.5))
    assert line["verdict"] == "not tested"
    (needed, *others) = line["conditions"]
    assert "balanced accuracy" in needed["what"]
    assert (needed["value"], needed["bound"], needed["met"]) == (pytest.approx(0.5), 0.5, None)
    assert all(condition["met"] for condition in others)
    assert judge_c6(*explained(unstable=0.8, stable=0.2, told=0.4))[0]["verdict"] == "not tested"
    assert page.judged([line]).startswith("**C6, as stated: not tested**")
    assert "balanced accuracy" in page.judged([line])
