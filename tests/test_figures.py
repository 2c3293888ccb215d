"""Figures, read back from their axes: what is drawn is what was planted."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from sae_stability.figures import function, stability, training, triggers
from sae_stability.figures.style import BAND_STYLES, KINDS, Kinds, count_ticks, new_axes, new_panels, series_style
from sae_stability.matching import BANDS
from sae_stability.statistics import LatentShares
from sae_stability.triggers import CLASSES

EIGHT = [f"{variant}, d_sae={width}" for variant in ("topk", "batchtopk", "matryoshka", "gated") for width in (256, 16384)]
SERIES = {
    "none": [0, 0, 0, 0],
    "all": [2, 2, 2, 2],
    "mixed": [0, 1, 1, 2],
}  # how often four features come back in two other seeds
PER_CENT = {"none": [100, 0, 0], "all": [0, 0, 100], "mixed": [25, 50, 25]}


def heights(axis) -> list[float]:
    return [bar.get_height() for bar in axis.patches]


def titles(figure) -> list[str]:
    """The panels that are seen, by their titles; a long one stands on several lines."""
    return [" ".join(axis.get_title().split()) for axis in figure.axes if axis.get_visible()]


def entries(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def matches(series: str, **columns) -> pd.DataFrame:
    return pd.DataFrame({"matches": SERIES[series], "trials": 2, **columns})


def with_interval(name: str, values, reach: float = 0.1) -> dict:
    values = np.asarray(values, dtype=float)
    return {name: values, f"{name}_low": values - reach, f"{name}_high": values + reach}


# Style


def test_twelve_series_are_told_apart_and_more_do_not_fail():
    assert len({series_style(position) for position in range(12)}) == 12
    assert series_style(12) == series_style(0)


def test_kinds_are_told_apart_by_colour_and_by_line():
    for field in ("colour", "line", "name"):
        assert len({getattr(kind, field) for kind in KINDS.values()}) == len(KINDS)


def test_an_unknown_kind_is_drawn_in_a_style_of_its_own_under_its_own_name():
    kinds = Kinds(KINDS)
    new, newer = kinds["permuted"], kinds["rotated"]
    assert (new.name, newer.name) == ("permuted", "rotated")
    assert new[:2] != newer[:2]
    assert kinds["permuted"] == new


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_there_is_a_panel_a_name_and_an_x_label_below_each_column(count):
    names = EIGHT[:count]
    figure, axes = new_panels("title", names, "x", "y")
    assert titles(figure) == names
    assert len(axes) == count
    assert sum(axis.get_xlabel() == "x" for axis in axes) == min(3, count)
    assert [axis.get_ylabel() for axis in axes] == ["y" if position % 3 == 0 else "" for position in range(count)]


@pytest.mark.parametrize("largest", [1, 3, 11, 23])
def test_ticks_of_counts_are_whole_and_few(largest):
    _, (axis,) = new_axes("title")
    axis.bar(range(largest + 1), 1)
    count_ticks(axis, largest)
    ticks = axis.get_xticks()
    assert len(ticks) <= 7
    assert (ticks == ticks.round()).all()
    assert ticks[0] == 0
    assert ticks[-1] <= largest


# Stability


def test_the_histogram_shows_counts_in_the_colours_of_their_bands():
    features = matches("mixed", band=["unstable", "intermediate", "intermediate", "stable"])
    figure = stability.stability_histogram(features, LatentShares(1.0, 1.0), "title")
    (axis,) = figure.axes
    assert heights(axis)[:3] == PER_CENT["mixed"]
    drawn = [to_hex(bar.get_facecolor()).upper() for bar in axis.patches[:3]]
    assert drawn == [BAND_STYLES[band].colour for band in ("unstable", "intermediate", "stable")]
    (fit,) = axis.get_lines()
    assert fit.get_ydata() == pytest.approx([100 / 3] * 3)  # Beta(1, 1): every count is as likely
    assert entries(axis.get_legend()) == ["beta-binomial fit", "unstable: 25%", "intermediate: 50%", "stable: 25%"]


def test_every_null_has_a_panel_under_its_name():
    kinds = dict(
        zip(["real", "surrogate", "randomised", "whitened", "permuted"], ["all", "none", "mixed", "all", "none"], strict=True)
    )
    figure = stability.against_nulls(pd.concat([matches(name, kind=kind) for kind, name in kinds.items()]), "title")
    assert titles(figure) == ["language model", "Gaussian surrogate", "shuffled weights", "whitened activations", "permuted"]
    for axis, name in zip(figure.axes, kinds.values(), strict=False):
        assert heights(axis) == PER_CENT[name]


def test_cells_that_share_a_variant_have_panels_of_their_own():
    planted = dict(zip(EIGHT, ["none", "all", "mixed", "none", "all", "mixed", "none", "all"], strict=True))
    features = pd.concat(
        [
            part
            for cell, name in planted.items()
            for part in (matches(name, name=cell, kind="real"), matches("none", name=cell, kind="surrogate"))
        ]
    )
    figure = stability.cell_histograms(features, "title")
    assert titles(figure) == EIGHT
    for axis, name in zip(figure.axes, planted.values(), strict=False):
        assert heights(axis) == [*PER_CENT[name], *PER_CENT["none"]]
    assert entries(figure.legends[0]) == ["language model", "Gaussian surrogate"]


def test_criteria_stand_beside_their_names():
    table = pd.DataFrame(
        {
            "criterion": ["decoder", "mutual"] * 2,
            "kind": ["real"] * 2 + ["surrogate"] * 2,
            **with_interval("mean_stability", [0.6, 0.5, 0.1, 0.0]),
            **with_interval("mean_stability_calibrated", [0.7, 0.8, 0.2, 0.2]),
        }
    )
    (axis,) = stability.criteria(table, "title").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mutual", "decoder"]
    drawn = [container.lines[0].get_xdata().tolist() for container in axis.containers]
    assert drawn == [[0.5, 0.6], [0.0, 0.1], [0.8, 0.7]]


def test_counted_and_fitted_shares_are_drawn_by_the_number_of_seeds():
    columns = {}
    for place, name in enumerate(["stable_share", "unstable_share", "latent_stable_share", "latent_unstable_share"]):
        columns |= with_interval(name, [0.1 * place, 0.1 * place + 0.3])
    figure = stability.by_seeds(pd.DataFrame({"seeds": [3, 4], **columns}), "title")
    drawn = [line.get_ydata().tolist() for axis in figure.axes for line in axis.get_lines()]
    assert drawn == [columns[name].tolist() for name in columns if name.endswith("share")]


def test_unique_families_have_a_line_where_nothing_comes_back():
    table = pd.DataFrame({"kind": "real", "seeds": [1, 2, 3], "families": [10, 15, 18], "features": 10.0})
    (axis,) = stability.unique_families(table, "title").axes
    assert [line.get_ydata().tolist() for line in axis.get_lines()] == [[10, 15, 18], [10, 20, 30]]


def test_a_family_counts_as_often_as_it_has_members():
    families = pd.DataFrame({"kind": ["real"] * 3 + ["surrogate"], "size": [1, 1, 2, 1]})
    (axis,) = stability.family_sizes(families, "title").axes
    assert heights(axis) == [50, 50, 100, 0]


def test_neighbours_are_counted_in_per_cent():
    features = pd.DataFrame({"mean_best_cosine": [0.905] * 4, "nearest_within": [0.105, 0.105, 0.305, 0.305]})
    figure = stability.neighbours(features, 0.7, "title")
    (axis,) = figure.axes
    tops = [patch.get_xy()[:, 1].max() for patch in axis.patches]
    assert tops == pytest.approx([100, 50])
    assert [text.get_text() for text in axis.texts] == ["0.7"]
    assert entries(figure.legends[0]) == ["in another seed, mean over seeds", "in its own dictionary"]


def test_thresholds_draw_a_line_a_kind_and_the_calibrated_threshold_where_it_differs():
    kinds = ["real", "surrogate", "whitened", "token-conditional", "permuted"]
    rows = [{"kind": kind, "threshold": t, **with_interval("mean_stability", 1 - t)} for kind in kinds for t in (0.3, 0.9)]
    table = pd.DataFrame(rows).astype({"threshold": float})
    for calibrated, extra in ((0.7, []), (np.nan, []), (0.5, ["calibrated threshold"])):
        figure = stability.thresholds(table, 0.7, calibrated, "title")
        assert entries(figure.legends[0]) == [KINDS[kind].name for kind in kinds] + extra
    curves = figure.axes[0].get_lines()[: len(kinds)]
    assert all(curve.get_ydata() == pytest.approx([0.7, 0.1]) for curve in curves)


def test_each_seed_has_a_line_against_frequency():
    features = pd.DataFrame({"seed": np.repeat([3, 5], 20), "frequency": np.tile(np.linspace(0.01, 0.2, 20), 2)})
    features["stability"] = np.where(features["seed"] == 3, 0.2, 0.6)
    (axis,) = stability.against_frequency(features, "title").axes
    first, second, mean = (line.get_ydata() for line in axis.get_lines())
    assert first == pytest.approx([0.2] * 10)
    assert second == pytest.approx([0.6] * 10)
    assert mean == pytest.approx([0.4] * 10)


@pytest.mark.parametrize(("decay_from", "legend"), [(60, ["the rate decays", "language model"]), (100, ["language model"])])
def test_growth_shades_the_decay_where_there_is_one(decay_from, legend):
    table = pd.DataFrame({"kind": "real", "tokens": [10, 100], **with_interval("mean_stability", [0.1, 0.6])})
    (axis,) = stability.growth(table, decay_from, "title").axes
    assert entries(axis.get_legend()) == legend
    assert axis.get_lines()[0].get_ydata().tolist() == [0.1, 0.6]


# Training


def test_eight_cells_have_a_line_a_seed_and_an_entry_a_cell():
    rows = [
        {"name": name, "seed": seed, "tokens": tokens, "explained_variance": tokens / 1000 + place / 10}
        for place, name in enumerate(EIGHT)
        for seed in (0, 1)
        for tokens in (0, 100)
    ]
    figure = training.cell_curves(pd.DataFrame(rows), "title")
    (axis,) = figure.axes
    assert len(axis.get_lines()) == 16
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}) == 8
    assert entries(figure.legends[0]) == [f"{name}, {0.1 + place / 10:.3f}" for place, name in enumerate(EIGHT)]


def test_training_curves_name_each_kind_once():
    rows = [
        {"kind": kind, "seed": seed, "tokens": tokens, "explained_variance": tokens / 100}
        for kind in ("real", "token-conditional")
        for seed in (0, 1, 2)
        for tokens in (10, 50, 90)
    ]
    (axis,) = training.training_curves(pd.DataFrame(rows), "title").axes
    assert entries(axis.get_legend()) == ["language model", "Gaussian around each token"]
    assert sum(len(line.get_xdata()) == 3 for line in axis.get_lines()) == 6


def test_steps_are_ordered_and_ours_stands_out():
    times = pd.DataFrame({"contestant": ["ours", "theirs", "slowest"], "ms": [10.0, 20.0, 40.0]})
    (axis,) = training.step_times(times, 5.0, "title").axes
    assert [bar.get_width() for bar in axis.patches] == [40, 20, 10]
    assert [text.get_text() for text in axis.texts] == ["40", "20", "10"]
    assert to_hex(axis.patches[2].get_facecolor()).upper() == KINDS["real"].colour


def test_frequencies_add_up_to_all_features():
    features = pd.DataFrame({"frequency": np.geomspace(1e-4, 1e-1, 50)})
    (axis,) = training.frequencies(features, "title").axes
    assert sum(heights(axis)) == pytest.approx(100)


# Triggers


def test_classes_of_triggers_stack_up_to_all_features_of_a_band():
    table = pd.DataFrame({"band": ["stable"] * 4 + ["unstable"] * 4, "equal_frequency": True})
    table["trigger"] = [CLASSES[0], CLASSES[0], CLASSES[1], CLASSES[2]] + [CLASSES[1]] * 4
    figure = triggers.trigger_classes(table, "title")
    assert titles(figure) == ["all features", "of equal frequency"]
    widths = np.array([bar.get_width() for bar in figure.axes[0].patches]).reshape(len(CLASSES), 2)  # [class, band]
    starts = np.array([bar.get_x() for bar in figure.axes[0].patches]).reshape(len(CLASSES), 2)
    assert widths[:3].tolist() == [[50, 0], [25, 100], [25, 0]]
    assert (starts == widths.cumsum(0) - widths).all()  # each begins where those before it end
    assert widths.sum(0).tolist() == [100, 100]
    assert entries(figure.legends[0]) == list(CLASSES)


def test_deltas_stand_at_their_quantities():
    quantities = list(triggers.QUANTITIES)
    rows = [
        {"features": chosen, "quantity": name, **{key: float(value) for key, value in with_interval("delta", place / 10).items()}}
        for chosen in ("all", "equal frequency")
        for place, name in enumerate(quantities)
    ]
    (axis,) = triggers.deltas(pd.DataFrame(rows[::-1]), "title").axes  # in any order
    points = [line for line in axis.get_lines() if line.get_marker() in ("o", "D")]
    assert all(line.get_xdata() == pytest.approx(np.arange(len(quantities)) / 10) for line in points)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(triggers.QUANTITIES.values())


def test_what_the_token_tells_is_drawn_beside_the_shuffled_text():
    table = pd.DataFrame({"band": ["stable", "unstable"] * 50, "explained_token": 0.5, "null_token": 0.25})
    (axis,) = triggers.token_tells(table, "title").axes
    assert axis.get_lines()[0].get_xdata() == [0.25, 0.25]
    assert entries(axis.get_legend()) == ["stable", "unstable", "99 % of features, text shuffled"]


# Function


def test_what_comes_back_is_drawn_for_the_model_beside_noise():
    kinds, weights = list(function.KIND_MARKERS), list(function.WEIGHT_NAMES)
    table = pd.DataFrame({"kind": np.repeat(kinds, 4), "weight": weights * 3}).assign(
        **with_interval("share", np.linspace(0, 0.9, 12))
    )
    (axis,) = function.reappearing(table, "title").axes
    points = [line for line in axis.get_lines() if line.get_marker() not in ("None", "", None)]
    drawn = [(line.get_marker(), round(float(line.get_xdata()[0])), float(line.get_ydata()[0])) for line in points]
    wanted = [(function.KIND_MARKERS[row.kind], weights.index(row.weight), row.share) for row in table.itertuples()]
    assert drawn == wanted


def test_fates_and_transplants_are_drawn_by_band():
    table = pd.DataFrame({"band": ["stable"] * 2 + ["unstable"] * 2, "fate": ["same", "same", "same", "missing"]})
    (axis,) = function.fates(table, ("same", "missing"), "title").axes
    assert [bar.get_width() for bar in axis.patches] == [100, 50, 0, 50]
    moved = pd.DataFrame({"band": ["stable", "unstable"] * 3, "what": np.repeat(["removed", "averaged", "transplanted"], 2)})
    moved = moved.assign(**with_interval("change", [6, 3, 5, 2, 4, 1]))
    figure = function.transplants(moved, "title")
    drawn = [[line.get_ydata()[0] for line in axis.get_lines() if line.get_marker() == "o"] for axis in figure.axes]
    assert drawn == [[6, 5, 4], [3, 2, 1]]


def test_features_are_drawn_with_the_marker_of_their_band():
    features = pd.DataFrame({"band": list(BANDS) * 4, "stability": [1.0, 0.5, 0.0] * 4})
    features["impact_reconstruction"], features["impact_prediction"] = np.linspace(-1, 1, 12), np.linspace(0, 1, 12)
    figure = function.impact_scatter(features, "title")
    for axis in figure.axes:
        scatters = [artist for artist in axis.collections if isinstance(artist, PathCollection)]
        assert [len(scatter.get_offsets()) for scatter in scatters] == [4, 4, 4]
        drawn = [to_hex(scatter.get_facecolor()[0]).upper() for scatter in scatters]
        assert drawn == [BAND_STYLES[band].colour for band in BANDS]


def test_approximations_stand_against_the_true_changes_by_band():
    sample = pd.DataFrame(
        {"band": list(BANDS), "true": [1e-6, 2e-6, 3e-6], "first_order": [2e-6, 3e-6, 4e-6], "second_order": [1e-6, 2e-6, 3e-6]}
    )
    figure = function.orders_check(sample, "title")
    assert titles(figure) == ["first order", "second order"]
    for axis, shift in zip(figure.axes, (1, 0), strict=True):
        scatters = [artist for artist in axis.collections if isinstance(artist, PathCollection)]
        points = np.array([scatter.get_offsets()[0] for scatter in scatters])
        assert points[:, 1] - points[:, 0] == pytest.approx([shift] * 3)  # in micronats
    assert entries(figure.legends[0]) == [*BANDS, "equal"]


def test_only_bands_that_have_features_are_outlined():
    features = pd.DataFrame({"band": ["stable", "unstable"] * 10, "log_energy": np.linspace(-3, 0, 20), "log_frequency": -1.0})
    figure = function.overlap(features, "title")
    assert entries(figure.legends[0]) == ["stable", "unstable"]


def test_sets_stand_beside_their_band():
    rows = [
        {
            "measure": "prediction",
            "set": chosen,
            "of": band,
            **{key: float(value) for key, value in with_interval("share", share).items()},
        }
        for chosen, share in (("band", 0.8), ("random", 0.4))
        for band in BANDS
    ]
    (axis,) = function.asymmetry(pd.DataFrame(rows), "title").axes
    points = {round(line.get_xdata()[0], 2): line.get_ydata()[0] for line in axis.get_lines() if line.get_marker() in ("o", "D")}
    assert points == {-0.1: 0.8, 0.9: 0.8, 1.9: 0.8, 0.1: 0.4, 1.1: 0.4, 2.1: 0.4}


def test_what_is_kept_is_drawn_in_the_order_of_features():
    table = pd.DataFrame(
        {"measure": "prediction", "order": "energy", "added": [1.0, 0.0, 0.5], **with_interval("share", [1.0, 0.0, 0.7])}
    )
    (axis,) = function.cumulative(table, {"stable": 0.2, "unstable": 0.3}, "title").axes
    drawn = next(line for line in axis.get_lines() if line.get_label() == "most energetic first")
    assert drawn.get_ydata().tolist() == [0, 0.7, 1]
    assert [line.get_xdata()[0] for line in axis.get_lines()[-2:]] == [0.2, 0.7]


def test_typical_features_are_drawn_at_the_angles_of_their_cosines():
    closest = pd.DataFrame({"band": ["stable"] * 3 + ["unstable"] * 3, "cosine": [1.0, 0.9, 0.8, 0.7, 0.5, 0.1]})
    figure = stability.typical_features(closest, 0.7, "title")
    told = []
    for axis, (_, of) in zip(figure.axes, closest.groupby("band"), strict=True):
        tips = np.array([arrow.xy for arrow in axis.texts])
        np.testing.assert_allclose(np.hypot(*tips.T), 1)  # unit length
        np.testing.assert_allclose(sorted(tips[:, 0]), sorted([1, *of["cosine"]]))
        wedge = axis.patches[0].get_xy()
        assert np.arctan2(*wedge.T[::-1]).max() == pytest.approx(np.arccos(0.7))
        told.append(axis.get_title())
    assert told == ["stable: back in 3\nof 3 other seeds", "unstable: back in 1\nof 3 other seeds"]
