import pandas as pd
import pytest

from sae_stability.figures import scale as figures


def cells(**columns) -> pd.DataFrame:
    table = pd.DataFrame(columns)
    for place, name in enumerate(figures.SERIES):
        table[name] = [0.1 * (place + 1) + 0.01 * row for row in range(len(table))]
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.05, table[name] + 0.05
    return table


def drawn(axis) -> dict[str, list[float]]:
    return {container.get_label(): list(container.lines[0].get_ydata()) for container in axis.containers}


def test_lengths_are_drawn_in_their_order_whatever_the_order_of_rows():
    table = cells(tokens=[3_000_000, 800_000, 10_000_000])
    (axis,) = figures.against_tokens(table, "x").axes
    shown = drawn(axis)
    for name, (*_, label) in figures.SERIES.items():
        assert shown[label] == pytest.approx(list(table[name].iloc[[1, 0, 2]]))


def test_widths_with_k_fixed_and_in_proportion_stand_apart():
    table = cells(d_sae=[1024, 512, 2048, 512, 2048], k=[16, 16, 16, 8, 32])
    fixed, proportional = figures.against_width(table, "x").axes
    label = figures.SERIES["mean_stability"][-1]
    assert drawn(fixed)[label] == pytest.approx(list(table["mean_stability"].iloc[[1, 0, 2]]))
    assert drawn(proportional)[label] == pytest.approx(list(table["mean_stability"].iloc[[3, 0, 4]]))
