"""Cells that share something put together: against closed forms, and against worlds whose effects are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sae_stability.random_effects import OWN, crossed


def grid(**levels: int) -> pd.DataFrame:
    """Every combination of levels, one row a cell."""
    return pd.MultiIndex.from_product([range(number) for number in levels.values()], names=levels).to_frame(index=False)


def drawn(levels: pd.DataFrame, spread: dict[str, float], draw: np.random.Generator) -> np.ndarray:
    value = spread.get(OWN, 0.0) * draw.normal(size=len(levels))
    for axis in levels:
        value += spread.get(axis, 0.0) * draw.normal(size=levels[axis].max() + 1)[levels[axis]]
    return value


def test_a_balanced_design_has_the_estimates_of_its_analysis_of_variance():
    """Of a models x b variants with one cell each, effects are mean squares (Searle, Casella & McCulloch 1992, section 4.3)."""
    a, b = 6, 8
    levels = grid(model=a, variant=b)
    value = drawn(levels, {"model": 2.0, "variant": 1.0, OWN: 0.5}, np.random.default_rng(0)) + 3
    table = value.reshape(a, b)
    rows, columns, whole = table.mean(1), table.mean(0), table.mean()
    own = ((table - rows[:, None] - columns + whole) ** 2).sum() / ((a - 1) * (b - 1))
    of_model, of_variant = b * ((rows - whole) ** 2).sum() / (a - 1), a * ((columns - whole) ** 2).sum() / (b - 1)
    found = crossed(value, np.full(a * b, 1e-6), levels)
    assert found.spread["model"] == pytest.approx(((of_model - own) / b) ** 0.5, rel=1e-3)
    assert found.spread["variant"] == pytest.approx(((of_variant - own) / a) ** 0.5, rel=1e-3)
    assert found.spread[OWN] == pytest.approx(own**0.5, rel=1e-3)
    assert found.mean.value == pytest.approx(whole)
    variance = (of_model + of_variant - own) / (a * b)
    assert found.mean.high - whole == pytest.approx(stats.t.ppf(0.975, a - 1) * variance**0.5, rel=1e-3)


def test_without_effects_the_mean_is_the_one_weighted_by_errors():
    levels, error = grid(model=2, layer=3), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    found = crossed(np.full(6, 0.7), error, levels)
    assert found.mean.value == pytest.approx(0.7)
    assert max(found.spread.values()) < 0.02
    assert found.mean.high - 0.7 == pytest.approx(stats.t.ppf(0.975, 1) * (1 / error**2).sum() ** -0.5, rel=0.02)


def test_what_models_share_widens_the_interval_until_it_holds_the_mean():
    """Of three models with eight cells each, whose cells taken for draws of their own would be too sure."""
    levels, draw, held, sure, studies = grid(model=3, variant=8), np.random.default_rng(1), 0, 0, 60
    for _ in range(studies):
        value = drawn(levels, {"model": 0.2, OWN: 0.1}, draw) + 0.02 * draw.normal(size=24)
        mean = crossed(value, np.full(24, 0.02), levels).mean
        held += mean.low <= 0 <= mean.high
        sure += abs(value.mean()) <= stats.t.ppf(0.975, 23) * value.std(ddof=1) / 24**0.5
    assert held / studies >= 0.91
    assert sure / studies < 0.7


def test_the_order_of_cells_the_names_of_levels_and_the_unit_change_nothing():
    levels, draw = grid(model=3, variant=4), np.random.default_rng(2)
    value, error = drawn(levels, {"model": 0.3, OWN: 0.1}, draw), draw.uniform(0.01, 0.1, 12)
    order, found = draw.permutation(12), crossed(value, error, levels)
    named = levels.iloc[order].assign(model=[f"model {level}" for level in levels["model"].iloc[order]])
    for other, unit in ((crossed(value[order], error[order], named), 1), (crossed(100 * value, 100 * error, levels), 100)):
        assert vars(other.mean) == pytest.approx({end: unit * each for end, each in vars(found.mean).items()}, rel=1e-3, abs=1e-4)
        assert other.spread == pytest.approx({axis: unit * each for axis, each in found.spread.items()}, rel=1e-2, abs=1e-3 * unit)


def test_axes_that_tell_nothing_are_left_out_and_few_cells_have_no_interval():
    levels = grid(model=2, variant=2).assign(corpus="docstrings", cell=range(4))
    assert list(crossed(np.arange(4.0), np.full(4, 0.1), levels).spread) == ["model", "variant", OWN]
    for count in (0, 1, 2):
        mean = crossed(np.full(count, 0.3), np.full(count, 0.1), levels[:count]).mean
        assert np.isnan([mean.low, mean.high]).all()
        assert np.isnan(mean.value) if count == 0 else mean.value == pytest.approx(0.3)
