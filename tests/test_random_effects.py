"""Cells that share something put together: against closed forms, and against worlds whose effects are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from sae_stability.random_effects import OWN, crossed


def grid(**levels: int) -> pd.DataFrame:
    """Every combination of levels, one row a cell."""
    return pd.MultiIndex.from_product([range(number) for number in levels.values()], names=levels).to_frame(index=False)


def drawn(levels: pd.DataFrame, spread: dict[str, float], draw: np.random.Generator) -> np.ndarray:
    value = spread.get(OWN, 0.0) * draw.normal(size=len(levels))
    for axis in levels:
        value += spread.get(axis, 0.0) * draw.normal(size=levels[axis].max() + 1)[levels[axis]]
    return value


def test_a_balanced_design_has_the_estimates_of_its_mean_squares():
    """With one cell for each of a models x b variants the restricted likelihood is one of three mean squares (Searle, Casella &
    McCulloch 1992, section 4.7); the penalty stands beside it."""
    a, b = 6, 8
    levels = grid(model=a, variant=b)
    value = drawn(levels, {"model": 2.0, "variant": 1.0, OWN: 0.5}, np.random.default_rng(0)) + 3
    table = value.reshape(a, b)
    rows, columns, whole = table.mean(1), table.mean(0), table.mean()
    squares = [b * ((rows - whole) ** 2).sum(), a * ((columns - whole) ** 2).sum()]
    squares.append(((table - rows[:, None] - columns + whole) ** 2).sum())
    degrees = [a - 1, b - 1, (a - 1) * (b - 1)]

    def means(logarithms: np.ndarray) -> np.ndarray:
        of_model, of_variant, own = np.exp(2 * logarithms)
        return np.array([b * of_model + own, a * of_variant + own, own])

    def deviance(logarithms: np.ndarray) -> float:
        expected = means(logarithms)
        return degrees @ np.log(expected) + (squares / expected).sum() - 2 * (logarithms - np.exp(logarithms) / value.std()).sum()

    best = optimize.minimize(deviance, np.log([2.0, 1.0, 0.5]), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10}).x
    found = crossed(value, np.full(a * b, 1e-6), levels)
    assert list(found.spread.values()) == pytest.approx(np.exp(best), rel=1e-3)
    assert list(found.spread) == ["model", "variant", OWN]
    assert found.mean.value == pytest.approx(whole)
    variance = means(best) @ [1, 1, -1] / (a * b)
    assert found.mean.high - whole == pytest.approx(stats.t.ppf(0.975, a - 1) * variance**0.5, rel=1e-3)


@pytest.mark.parametrize("error", [0.0, 1e-9])
def test_cells_that_are_alike_or_known_exactly_are_put_together_too(error):
    levels = grid(model=2, layer=3)
    assert crossed(np.arange(6.0), np.full(6, error), levels).mean.value == pytest.approx(2.5)
    alike = crossed(np.full(6, 0.7), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), levels)
    assert alike.mean.value == pytest.approx(0.7)
    assert max(alike.spread.values()) < 0.3  # less than the median error: none of it is asked for


@pytest.mark.parametrize("cells", [(8, 8, 8), (20, 1, 1)])
def test_what_models_share_widens_the_interval_until_it_holds_the_mean(cells):
    """Of three models, whose cells taken for draws of their own would be too sure: also where nearly all are of one model."""
    levels, draw, held, sure, studies = pd.DataFrame({"model": np.repeat(range(3), cells)}), np.random.default_rng(1), 0, 0, 40
    count = len(levels)
    for _ in range(studies):
        value = drawn(levels, {"model": 0.2, OWN: 0.1}, draw) + 0.02 * draw.normal(size=count)
        mean = crossed(value, np.full(count, 0.02), levels).mean
        held += mean.low <= 0 <= mean.high
        sure += abs(value.mean()) <= stats.t.ppf(0.975, count - 1) * value.std(ddof=1) / count**0.5
    assert held / studies >= 0.9
    assert sure / studies < 0.75


def test_the_order_of_cells_the_names_of_levels_and_the_unit_change_nothing():
    levels, draw = grid(model=3, variant=4), np.random.default_rng(2)
    value, error = drawn(levels, {"model": 0.3, OWN: 0.1}, draw), draw.uniform(0.01, 0.1, 12)
    order, found = draw.permutation(12), crossed(value, error, levels)
    named = levels.iloc[order].assign(model=[f"model {level}" for level in levels["model"].iloc[order]])
    for other, unit in ((crossed(value[order], error[order], named), 1), (crossed(100 * value, 100 * error, levels), 100)):
        assert vars(other.mean) == pytest.approx({end: unit * each for end, each in vars(found.mean).items()}, rel=1e-3, abs=1e-4)
        assert other.spread == pytest.approx({axis: unit * each for axis, each in found.spread.items()}, rel=1e-2, abs=1e-3 * unit)


def test_axes_that_tell_nothing_are_left_out_and_without_any_there_is_no_interval():
    levels = grid(model=2, variant=2).assign(corpus="docstrings", cell=range(4))
    assert list(crossed(np.arange(4.0), np.full(4, 0.1), levels).spread) == ["model", "variant", OWN]
    for count, axes in ((0, levels), (1, levels), (2, levels), (4, levels[["corpus", "cell"]])):
        mean = crossed(np.full(count, 0.3), np.full(count, 0.1), axes[:count]).mean
        assert np.isnan([mean.low, mean.high]).all()
        assert np.isnan(mean.value) if count == 0 else mean.value == pytest.approx(0.3)
