import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from sae_stability.book import explorer
from sae_stability.experiments import examples, groups, matching
from sae_stability.matching import BANDS

FIRST_VIEW = 500_000
"""Bytes of data that the first view may load."""


def piece(site, name: str):
    """The data that a script hands over."""
    text = (site / explorer.FOLDER / f"{name}.js").read_text(encoding="utf-8")
    handed = re.fullmatch(r'explorer\.take\("([^"]+)",(.*)\);\n', text, re.S)
    assert handed
    assert handed[1] == name
    return json.loads(handed[2])


def opened(browser, address: str):
    """The explorer, and what it asks for; an error on the page is among it."""
    asked: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error: {error}"))
    page.goto(address)
    page.wait_for_selector("#explorer tbody a")
    return page, asked


@pytest.fixture(scope="module")
def live(quick):
    """The live features of the main cell's first SAE."""
    features = quick.table("features").query("kind == 'real' and alive")
    return features[features["seed"] == features["seed"].iloc[0]]


def test_the_list_says_of_each_feature_what_the_tables_say(site, quick, live):
    listed, about = piece(site, "features-0"), piece(site, "about")
    assert listed["feature"] == live["feature"].tolist()
    assert [BANDS[band] for band in listed["band"]] == live["band"].tolist()
    assert listed["matches"] == live["matches"].tolist()
    assert listed["frequency"] == pytest.approx(live["frequency"].tolist(), rel=0.005)
    ends = live[["matches", "stability_low", "stability_high"]].itertuples(index=False)
    assert all((about["low"][n], about["high"][n]) == pytest.approx((low, high), abs=6e-4) for n, low, high in ends)
    triggers = quick.table("triggers").set_index(["seed", "feature"])["trigger"].loc[live["seed"].iloc[0]]
    assert [about["triggers"][of] for of in listed["trigger"]] == triggers.loc[listed["feature"]].tolist()
    told = quick.table("explanations").set_index(["seed", "feature"])["text"].loc[live["seed"].iloc[0]]
    explained = {feature: text for feature, text in zip(listed["feature"], listed["explanation"], strict=True) if text}
    assert explained == told.to_dict()


def test_partners_and_contexts_are_those_that_were_found(site, quick, live):
    matched, windows = matching.stability(quick.main), examples.seen(quick.main, 0)
    for feature in live["feature"].iloc[[0, -1]]:
        detail = piece(site, f"contexts-0-{feature // explorer.A_PIECE}")[feature % explorer.A_PIECE]
        assert [[other, partner] for other, partner, _ in detail["partners"]] == [
            [other, int(matched.partner[0, other, feature])] for other in range(1, len(matched.alive))
        ]
        own = windows[windows["feature"] == feature]
        assert [window["tokens"] for window in detail["windows"]] == [tokens.tolist() for tokens in own["tokens"]]
        assert max(detail["windows"][0]["activations"]) == detail["windows"][0]["activations"][detail["windows"][0]["peak"]]
        assert len(detail["raised"]) == len(detail["lowered"]) > 0


def test_a_feature_is_listed_with_its_group(quick, live, monkeypatch):
    chosen = live["feature"].iloc[3]
    members = pd.DataFrame({"seed": [0, 2], "feature": [chosen, live["feature"].iloc[4]], "group": [7, 8]})
    monkeypatch.setattr(groups, "members", lambda results: members)
    main = replace(quick.main, entries={**quick.main.entries, "groups": ("there",)})
    listed = explorer._features(main, None, [], 0, examples.seen(main, 0))
    assert {feature: group for feature, group in zip(listed["feature"], listed["group"], strict=True) if group >= 0} == {chosen: 7}


@pytest.mark.parametrize("from_disk", [False, True], ids=["from a server", "from disk"])
def test_the_list_is_filtered_and_a_feature_opens(site, address, chromium, quick, live, from_disk):
    page, asked = opened(chromium, f"{site.as_uri() if from_disk else address}/explorer.html")
    data = {request.rpartition("/")[2] for request in asked if "/explorer/" in request} - {"datatables.js", "datatables.css"}
    assert data == {"about.js", "features-0.js"}
    assert sum((site / explorer.FOLDER / name).stat().st_size for name in data) < FIRST_VIEW
    count = page.get_by_role("status")
    assert count.inner_text() == f"{len(live)} of {len(live)} live features"
    page.get_by_role("combobox", name="Band").select_option("unstable")
    assert count.inner_text().startswith(f"{(live['band'] == 'unstable').sum()} of")
    page.get_by_label("at least (%)").fill("1")
    rare = (live["band"] == "unstable") & (live["frequency"].map(lambda share: float(f"{share:.3g}")) >= 0.01)
    assert count.inner_text().startswith(f"{rare.sum()} of")
    page.get_by_role("combobox", name="Band").select_option("any")
    page.get_by_label("at least (%)").fill("")
    tokens = piece(site, "features-0")["token"]
    page.get_by_label("Token or explanation").fill(tokens[0].strip())
    assert int(count.inner_text().split()[0]) >= 1
    page.get_by_role("combobox", name="SAE").select_option("all seeds")
    page.get_by_label("Token or explanation").fill("")
    everyone = quick.table("features").query("kind == 'real' and alive")
    page.wait_for_function(
        "text => document.querySelector('[role=status]').textContent === text",
        arg=f"{len(everyone):,} of {len(everyone):,} live features",
    )
    page.get_by_role("combobox", name="SAE").select_option(index=0)
    page.wait_for_function("count => document.querySelector('[role=status]').textContent.startsWith(count)", arg=f"{len(live)} of")
    link = page.locator("#explorer tbody a").first
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#explorer .partner code")
    seed, feature = link.inner_text().split(":")
    assert page.locator("#explorer h3").inner_text() == f"Feature {feature} of seed {seed}"
    assert page.evaluate("document.activeElement.tagName") == "H3"
    assert page.locator("#explorer .partner").count() == quick.cell.seeds - 1
    row = live.set_index("feature").loc[int(feature)]
    assert f"{row['matches']} of {row['trials']} other SAEs" in page.locator("#explorer dl").inner_text()
    assert page.locator("#explorer .partner.back").count() == row["matches"]
    assert page.locator("#explorer figure rect").count() > 10
    page.locator("#explorer .partner a").first.click()
    page.wait_for_function("before => !document.querySelector('#explorer h3').textContent.endsWith(before)", arg=f"seed {seed}")
    assert not [request for request in asked if request.startswith("error")]


def test_a_link_to_a_feature_opens_it(site, address, chromium, live):
    feature = live["feature"].iloc[-1]
    page, _ = opened(chromium, f"{address}/explorer.html#feature-0-{feature}")
    page.wait_for_selector("#explorer .partner code")
    assert page.locator("#explorer h3").inner_text().startswith(f"Feature {feature} of seed")
