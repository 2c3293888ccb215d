import html
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import drawn
from sae_stability.book import slider
from sae_stability.experiments import matching
from sae_stability.matching import stability


def test_shares_are_those_of_counting_at_every_threshold():
    common = drawn(1, 12, 6)
    W = F.normalize(common + 0.6 * drawn(4, 12, 6, seed=1), dim=2)
    W[0, 3] = 0  # dead
    shares = slider.shares_back(stability(W, 0.7, W.norm(dim=2) > 0))
    assert len(shares) == len(slider.THRESHOLDS)
    assert all(share == round(share, 4) for row in shares for share in row)  # the page carries no digits that say nothing
    for at in (0, 25, 60):
        cosines = torch.einsum("sid,tjd->stij", W, W).amax(3)
        counts = [
            sum(float(cosines[s, t, i]) >= slider.THRESHOLDS[at] for t in range(4) if t != s)
            for s in range(4)
            for i in range(12)
            if W[s, i].any()
        ]
        assert shares[at] == pytest.approx((np.bincount(counts, minlength=4) / 47).tolist(), abs=1e-4)


def test_the_slider_carries_its_data_and_begins_at_the_threshold():
    found = stability(F.normalize(drawn(3, 8, 5), dim=2), 0.7)
    page = slider.threshold_slider({"real": found, "surrogate": found}, {"real": "a <model>", "surrogate": "noise"}, 0.7)
    data = json.loads(html.unescape(re.search(r'data-shares="([^"]*)"', page)[1]))
    assert list(data["kinds"]) == ["a <model>", "noise"]
    assert data["thresholds"][int(re.search(r'value="(\d+)"', page)[1])] == 0.7


def test_a_reader_moves_the_threshold(address, chromium, quick):
    page, shares = chromium.new_page(), slider.shares_back(matching.stability(quick.main))
    page.goto(f"{address}/stability.html")
    at = slider.THRESHOLDS.index(quick.cell.threshold)
    told = page.locator(".slider output")
    for step in range(3):
        none, everyone = (f"{100 * shares[at + step][count]:.0f} %" for count in (0, -1))
        assert told.inner_text().startswith(f"{slider.THRESHOLDS[at + step]:.2f}.")
        assert f"{none} come back in none, {everyone} in all {quick.cell.seeds - 1}" in told.inner_text()
        heights = page.locator(".slider .columns").first.locator("i").evaluate_all("bars => bars.map((bar) => bar.style.height)")
        assert [float(height.rstrip("%")) for height in heights] == pytest.approx([100 * share for share in shares[at + step]])
        page.locator(".slider input").press("ArrowRight")
