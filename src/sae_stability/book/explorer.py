"""The feature explorer's data: static files that its page reads piece by piece, from any web host and from disk.

A page on a disk may load nothing but scripts, so each piece is a script that hands its data over. What the first view needs is
small: the list of a seed's features. Their contexts follow when a reader opens one.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_stability.experiments import Results, ensembles, examples, explanations, groups, impacts, matching, quality, triggers
from sae_stability.matching import BANDS
from sae_stability.statistics import binomial_interval

FOLDER = "explorer"
"""Beside the pages: what stands in `_static` Jupyter Book has every page load."""
NEEDS = "examples"
"""The experiment without which there is nothing to look at."""
A_PIECE = 16
"""Features whose contexts share a file."""
EXPORTED = re.compile(r"export\{(?P<names>[\w$ ,]+)\}")

CONTAINER = f'<div id="explorer" data-folder="{FOLDER}"><noscript>The explorer needs JavaScript.</noscript></div>'
"""What the page holds of it as it is written; `explorer.js` fills it."""


def write(results: Results, into: Path) -> None:
    """Write the pieces of a cell's features, and the library that shows them, into a folder."""
    into.mkdir(parents=True)
    _write_library(into)
    matched, seeds = matching.stability(results), ensembles.ensemble(results).seeds
    seeds = seeds[: examples.EXPLORED]
    low, high = binomial_interval(np.arange(matched.trials + 1), matched.trials)
    fires_on = triggers.by_band(results) if "triggers" in results.entries else None
    classes = [] if fires_on is None else sorted(fires_on["trigger"].unique())
    about = {
        "seeds": seeds,
        "bands": BANDS,
        "trials": matched.trials,
        "threshold": matched.threshold,
        "low": low.round(3).tolist(),
        "high": high.round(3).tolist(),
        "triggers": classes,
        "piece": A_PIECE,
    }
    _hand_over(into, "about", about)
    words = pd.read_parquet(results.folder(NEEDS) / "vocabulary.parquet")["token"].tolist()
    for position in range(len(seeds)):
        windows = examples.seen(results, position)
        _hand_over(into, f"features-{position}", _features(results, fires_on, classes, position, windows))
        details = _details(results, position, len(seeds), windows, words)
        for first in range(0, len(details), A_PIECE):
            _hand_over(into, f"contexts-{position}-{first // A_PIECE}", details[first : first + A_PIECE])


def _hand_over(into: Path, name: str, data: Any) -> None:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    (into / f"{name}.js").write_text(f'explorer.take("{name}",{text});\n', encoding="utf-8")


def _write_library(into: Path) -> None:
    """DataTables as itables brings it, as a script: browsers refuse modules from a disk."""
    bundle = files("itables") / "html"
    module = (bundle / "dt_bundle.js").read_text(encoding="utf-8")
    (exported,) = EXPORTED.finditer(module)
    (jquery,) = [part.split(" as ")[0] for part in exported["names"].split(",") if part.endswith(" as jQuery")]
    script = f"{module[: exported.start()]}window.jQuery={jquery}{module[exported.end() :]}"
    (into / "datatables.js").write_text(f"(()=>{{{script}\n}})();\n", encoding="utf-8")
    (into / "datatables.css").write_text((bundle / "dt_bundle.css").read_text(encoding="utf-8"), encoding="utf-8")


def _features(
    results: Results, fires_on: pd.DataFrame | None, classes: list[str], position: int, windows: pd.DataFrame
) -> dict[str, list]:
    """The list of a seed's live features, by column; what a study was not asked has no column."""
    matched, frequency = matching.stability(results), quality.fit(results).frequency[position]
    live = np.flatnonzero(matched.alive[position])
    strongest = windows[windows["rank"] == 1].set_index("feature")
    peaks = zip(strongest["tokens"], strongest["peak"] - strongest["first"], strict=True)
    token = pd.Series([tokens[peak] for tokens, peak in peaks], strongest.index, dtype=str)
    columns: dict[str, list] = {
        "feature": live.tolist(),
        "band": matched.band[position][live].tolist(),
        "matches": matched.counts[position][live].tolist(),
        "frequency": _rounded(frequency[live]),
        "token": token.reindex(live, fill_value="").tolist(),
    }
    if "impacts" in results.entries:
        columns["impact"] = _rounded(impacts.single(results).impacts.on_prediction[position][live])
    seed = ensembles.ensemble(results).seeds[position]
    if fires_on is not None:
        trigger = fires_on[fires_on["seed"] == seed].set_index("feature")["trigger"].reindex(live)
        columns["trigger"] = [classes.index(name) if isinstance(name, str) else -1 for name in trigger]
    if "explanations" in results.entries:
        told = explanations.by_band(results)
        told = told[told["seed"] == seed].drop_duplicates("feature", keep="last").set_index("feature")["text"]
        columns["explanation"] = told.reindex(live).fillna("").tolist()
    if "groups" in results.entries:
        members = groups.members(results)
        group = members[members["seed"] == position].set_index("feature")["group"].reindex(live)
        columns["group"] = group.fillna(-1).astype(int).tolist()
    return columns


def _details(results: Results, position: int, seeds: int, windows: pd.DataFrame, words: list[str]) -> list[dict]:
    """Of each feature of a seed what a reader sees who opens it."""
    table = pd.read_parquet(results.folder(NEEDS) / f"features-{position}.parquet")
    matched, of_feature = matching.stability(results), dict(iter(windows.groupby("feature")))
    details = []
    for row in table.to_dict("records"):
        feature = row["feature"]
        detail: dict[str, Any] = {"strongest": _rounded([row["strongest"]])[0], "histogram": row["histogram"].tolist()}
        shown = of_feature.get(feature, windows.iloc[:0])
        detail["windows"] = [
            {
                "rank": int(window.rank),
                "peak": int(window.peak - window.first),
                "tokens": window.tokens.tolist(),
                "activations": _rounded(window.activations),
            }
            for window in shown.itertuples()
        ]
        for name in ("raised", "lowered"):
            if name in row:
                detail[name] = [[words[token], by] for token, by in zip(row[name], _rounded(row[f"{name}_by"]), strict=True)]
        partner, cosine = (of[position, :seeds, feature].tolist() for of in (matched.partner, matched.best_cosine))
        detail["partners"] = [[other, partner[other], round(cosine[other], 3)] for other in range(seeds) if partner[other] >= 0]
        details.append(detail)
    return details


def _rounded(values) -> list[float]:
    """To three digits."""
    return [float(f"{float(value):.3g}") for value in values]
