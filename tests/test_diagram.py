"""The phase diagram to look into says of each point what the published table says."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest

from sae_stability.book import diagram, page
from sae_stability.synthetic import World


@pytest.fixture(scope="module")
def worlds() -> pd.DataFrame:
    return page.rows("worlds/worlds")


def test_the_page_carries_every_world_and_every_slice_is_told_apart(worlds):
    data = json.loads(html.unescape(re.search(r'data-worlds="([^"]*)"', diagram.phase_diagram(worlds))[1]))
    assert set(data["slices"]) == set(worlds["slice"])
    shown = pd.DataFrame(data["worlds"])
    assert len(shown) == len(worlds)
    for name in diagram.FOUND:
        np.testing.assert_allclose(shown[name].astype(float), worlds[name], atol=1e-4)
    for name, (rows, columns, panels) in diagram.SLICES.items():
        of_slice = worlds[worlds["slice"] == name]
        told = of_slice.groupby([rows, columns, *([panels] if panels else [])], dropna=False)
        for parameter in set(diagram.PARAMETERS) - {"k", "d_sae", "d_in"}:  # worlds behind one point differ in their draw alone
            assert told[parameter].nunique(dropna=False).max() == 1, (name, parameter)


def test_parameters_that_are_told_are_those_of_a_world():
    told = set(diagram.PARAMETERS) - {"k", "d_sae", "d_in"}
    assert told == set(World.__dataclass_fields__) - {"seed"}


def test_a_reader_sees_the_world_behind_a_point(address, chromium, worlds):
    reader = chromium.new_page()
    reader.goto(f"{address}/synthetic.html")
    shown = reader.locator(".diagram")
    for name, share, place in (("active and budget", "found_in_blocks", 16), ("frequency and tokens", "found_rare", 5)):
        shown.locator(".slice").select_option(name)
        shown.locator(".share").select_option(share)
        point = shown.locator(".panels button").nth(place)
        point.focus()
        reader.keyboard.press("Enter")
        code = shown.locator(".world code").inner_text()
        world = eval(re.search(r"measure\((World\(.*\)), seeds=", code)[1], {"World": World})
        of_slice = worlds[worlds["slice"] == name]
        same = [
            all(_same(getattr(world, key), row[key]) for key in World.__dataclass_fields__ if key != "seed")
            for _, row in of_slice.iterrows()
        ]
        behind = of_slice[same]
        assert len(behind) == worlds.loc[behind.index, "seed"].nunique() > 0
        assert point.inner_text() == f"{behind[share].mean():.2f}"
        told = shown.locator(".world tbody tr").filter(has_text=diagram.FOUND[share]).locator("td").all_inner_texts()
        assert told == [f"{value:.2f}" for value in behind[share]]
        assert point.get_attribute("aria-pressed") == "true"
    assert shown.locator(".panels tbody").first.locator("th").all_inner_texts() == ["0.0001", "0.001", "0.01"]


def _same(value, told) -> bool:
    return bool(pd.isna(told)) if value is None else value == told
