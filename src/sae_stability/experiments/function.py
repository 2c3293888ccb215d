"""What features do (C2 to C4): the bands of the ensemble and of its surrogate removed, beside controls; and single features."""

import math
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from sae_stability import ablation
from sae_stability.ablation import Effects, Sets, sets_of
from sae_stability.ablation.effects import ALL, MEASURES, NONE
from sae_stability.evaluation import Encoded
from sae_stability.experiments import ensembles, matching, texts
from sae_stability.experiments.columns import each_kind, interval_columns
from sae_stability.experiments.experiment import IS_MAIN, Experiment, Results
from sae_stability.experiments.matching import CODE_TOKENS
from sae_stability.files import save_tensors
from sae_stability.ledger import MOST, Condition, Rule, judged
from sae_stability.matching import BANDS
from sae_stability.statistics import Interval

KINDS = ["real", "surrogate"]
SAMPLED = 8  # features of each band, of the first seed, whose impact on prediction is measured one by one
WEAK = 0.5
SMALLEST_SUPPORT = 0.3
STABLE_BAND = ("band", "stable")

C2 = Rule(
    "C2",
    "share of what all features add to the explained variance that is lost without the stable ones, codes fixed",
    "supported in this model if the 95 % intervals lie above their bounds: what is lost without the stable features, and what is "
    f"kept with them only, above {MOST:g} of what all features carry; the first above that of as many random features, with codes "
    "fixed, and once codes are chosen again and the decoder fitted again; not supported if one lies below; inconclusive otherwise",
)
C3 = Rule(
    "C3",
    "share of what the removal of all features adds to the cross-entropy that is added without the stable ones, error kept",
    "supported in this model if the 95 % intervals lie above their bounds: what is lost without the stable features, and what is "
    f"kept with them only, above {MOST:g} of what all features carry; the first above that of as many random features; and that of "
    "stable features above that of their matches outside the band, alike in energy and frequency; not supported if one lies below; "
    f"inconclusive otherwise, and where less than {SMALLEST_SUPPORT:.0%} of the band's energy has a match",
)
C4 = Rule(
    "C4",
    "mean impact of an unstable feature alone on the cross-entropy, to second order, where an average live feature has 1",
    f"supported in this model if the statistic is equivalent to 0 within {WEAK:g} (two one-sided tests at 5 %), and the impact of "
    "unstable features lies below that of their matches outside the band, alike in energy and frequency (95 %); not supported if "
    f"one fails; inconclusive otherwise, and where less than {SMALLEST_SUPPORT:.0%} of the band's energy has a match",
)


def compute(results: Results, folder: Path) -> None:
    """Remove the bands of the ensemble and of its surrogate, with their controls; on the main cell also in several orders.

    The surrogate's SAEs are judged on what they were trained on for reconstruction, and on the model's activations for prediction.
    """
    site, study = texts.reading(results, results.study.ablation_tokens), results.study
    cluster = site.contexts.cluster[site.contexts.is_text]
    for kind in KINDS:
        ensemble, matched = ensembles.ensemble(results, kind), matching.stability(results, kind)
        encoded = Encoded.of(ensemble, texts.activations(results, "evaluation", kind).first(CODE_TOKENS))
        detail: Literal["bands", "controls", "curves"] = (
            "bands" if kind == "surrogate" else "curves" if results.is_main else "controls"
        )
        measured, removed = ablation.measure(encoded, matched, cluster, site, tokens_alone=study.loss_tokens, detail=detail)
        save_tensors(folder / f"{kind}.safetensors", measured.tensors(), {})
        if kind == "real" and results.is_main:
            sampled, first = ablation.sample(measured, removed, SAMPLED), ensemble.of(0)
            alone = ablation.impact_on_prediction(site, first, {})
            true = ablation.true_impact_on_prediction(site, first, sampled)
            orders = {"first_order": alone.first_order[0, sampled[0]], "second_order": alone.second_order[0, sampled[0]]}
            save_tensors(folder / "sample.safetensors", {"feature": sampled[0], "true": true[0], **orders}, {})


def effects(results: Results, kind: str = "real") -> tuple[Effects, Sets]:
    """The effects of removals, and the sets that were removed."""
    measured = _load(results.folder("function") / f"{kind}.safetensors")
    return measured, sets_of(matching.stability(results, kind), measured.energy, measured.firings, measured.curves)


@lru_cache(maxsize=4)
def _load(path: Path) -> Effects:
    return Effects.of(load_tensors(path))


def removals(results: Results) -> pd.DataFrame:
    """One row per set, measure and reading, for the ensemble and for its surrogate."""
    return each_kind(KINDS, lambda kind: shares(effects(results, kind)[0]))


def shares(effects: Effects) -> pd.DataFrame:
    """One row per set, measure and reading: what it carries, as a share of what all features carry, and the change itself.

    Sets named `paired less matched` and `band less random` are differences of two. Ablations of the whole site have a change only.
    """
    rows: list[dict] = []
    for entry in effects.sums:
        measure, reading, *name = entry.split("/")
        if len(name) == 2 and tuple(name) != NONE:
            members = (name[0], name[1])
            row = {"measure": measure, "reading": reading, "set": name[0], "of": name[1]}
            share, change = effects.share(measure, reading, members), effects.raw(measure, reading, members)
            rows.append({**row, **interval_columns("share", share), **interval_columns("change", change)})
    for measure, band, (group, less) in product(MEASURES, BANDS, (("paired", "matched"), ("band", "random"))):
        if f"{measure}/removed/{group}/{band}" in effects.sums:
            apart = effects.share(measure, "removed", (group, band), less=(less, band))
            row = {"measure": measure, "reading": "removed", "set": f"{group} less {less}", "of": band}
            rows.append({**row, **interval_columns("share", apart)})
    for ablated in ("zero", "mean"):
        row = {"measure": "prediction", "reading": ablated, "set": "site", "of": ""}
        rows.append({**row, **interval_columns("change", effects.site(ablated))})
    return pd.DataFrame(rows)


def bands(results: Results) -> pd.DataFrame:
    """One row per band and seed: its size, its share of the features' energy, and how much of that has a match outside."""

    def rows(kind: str) -> pd.DataFrame:
        measured, removed = effects(results, kind)
        table = []
        for band, (position, seed) in product(BANDS, enumerate(ensembles.ensemble(results, kind).seeds)):
            inside, alive = removed.members["band", band][position], removed.members[ALL][position]
            energy = measured.energy[position]
            table.append(
                {
                    "band": band,
                    "seed": seed,
                    "features": int(inside.sum()),
                    "share": float(inside.sum() / alive.sum()),
                    "energy_share": float(energy[inside].sum() / energy[alive].sum()),
                    "matched": int(removed.members["paired", band][position].sum()),
                    "support": float(removed.support[band][position]),
                }
            )
        return pd.DataFrame(table)

    return each_kind(KINDS, rows)


def impact(results: Results) -> pd.DataFrame:
    """One row per live feature of the ensemble: its stability, and what its removal alone does.

    Columns: `impact_reconstruction`, the share of the explained variance that is lost; `impact_prediction`, to second order, nats a
    token; `energy`, the share of all features' energy; `frequency`; and which of the matched sets it is in.
    """
    measured, removed = effects(results)
    matched = matching.stability(results)
    parts = []
    for position, seed in enumerate(ensembles.ensemble(results).seeds):
        live = matched.alive[position].nonzero()[:, 0]
        explained = measured.sums["reconstruction/size"].sum() - measured.sums["reconstruction/intact"][position].sum()
        columns = {
            "seed": seed,
            "feature": live,
            "band": np.array(BANDS)[matched.band[position, live]],
            "stability": matched.probability[position, live],
            "frequency": measured.firings[position, live] / measured.rows,
            "energy": measured.energy[position, live] / measured.energy[position].sum(),
            "impact_reconstruction": measured.impact[position, live] / explained,
            "impact_prediction": measured.on_prediction[position, live],
        }
        for band in BANDS:
            columns |= {f"{role}_{band}": removed.members[role, band][position, live] for role in ("paired", "matched")}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def single_removals(results: Results) -> pd.DataFrame:
    """Some features of the first seed of the main cell: what their removal does to the prediction, truly and by either order."""
    columns = ["feature", "band", "first_order", "true", "second_order"]
    if not results.is_main:
        return pd.DataFrame(columns=columns)
    sample, matched = load_file(results.folder("function") / "sample.safetensors"), matching.stability(results)
    band = np.array(BANDS)[matched.band[0, sample["feature"]]]
    orders = {"first_order": sample["first_order"], "second_order": sample["first_order"] + sample["second_order"]}
    return pd.DataFrame({"feature": sample["feature"], "band": band, "true": sample["true"], **orders})[columns]


def judge(results: Results) -> list[dict]:
    (real, sets), (surrogate, surrogate_sets) = effects(results), effects(results, "surrogate")
    return [judge_c2(real, surrogate), judge_c3(real, sets, surrogate), judge_c4(real, sets, surrogate, surrogate_sets)]


def judge_c2(effects: Effects, surrogate: Effects) -> dict:
    """C2 on one cell: most of the reconstruction. The null's value is the surrogate's, by its own stable band."""
    again = effects.share("reselected", "removed", STABLE_BAND, less=("random", "stable"))
    what = "the same once codes are chosen again and the decoder is fitted again"
    conditions = [*_carries_most(effects, "reconstruction"), Condition(what, again, 0.0, control=True)]
    value, null = (of.share("reconstruction", "removed", STABLE_BAND) for of in (effects, surrogate))
    return judged(C2, value, null, conditions)


def judge_c3(effects: Effects, sets: Sets, surrogate: Effects) -> dict:
    """C3 on one cell: most of the prediction. The null's value is that of the surrogate's SAEs on the model's activations."""
    apart = effects.share("prediction", "removed", ("paired", "stable"), less=("matched", "stable"))
    what = "lost without stable features that have a match, less that of their matches"
    matched = _supported(Condition(what, apart, 0.0, control=True), sets, "stable")
    value, null = (of.share("prediction", "removed", STABLE_BAND) for of in (effects, surrogate))
    return judged(C3, value, null, [*_carries_most(effects, "prediction"), matched])


def _carries_most(effects: Effects, measure: str) -> list[Condition]:
    apart = effects.share(measure, "removed", STABLE_BAND, less=("random", "stable"))
    return [
        Condition("lost without the stable features", effects.share(measure, "removed", STABLE_BAND), MOST),
        Condition("kept with the stable features only", effects.share(measure, "kept", STABLE_BAND), MOST),
        Condition("lost without the stable features, less that of as many random ones", apart, 0.0),
    ]


def judge_c4(effects: Effects, sets: Sets, surrogate: Effects, surrogate_sets: Sets) -> dict:
    """C4 on one cell: a weak marginal impact is one that is equivalent to none, within a margin."""
    unstable = ("band", "unstable")
    one_sided = effects.marginal(sets, unstable, confidence=0.9)  # its ends are those of the two one-sided tests
    apart = effects.marginal(sets, ("paired", "unstable"), ("matched", "unstable"))
    what = "impact of unstable features that have a match, less that of their matches"
    matched = _supported(Condition(what, apart, 0.0, below=True, control=True), sets, "unstable")
    conditions = [
        Condition("impact of an unstable feature (90 % interval)", one_sided, -WEAK),
        Condition("impact of an unstable feature (90 % interval)", one_sided, WEAK, below=True),
        matched,
    ]
    value, null = effects.marginal(sets, unstable), surrogate.marginal(surrogate_sets, unstable)
    return judged(C4, value, null, conditions)


def _supported(condition: Condition, sets: Sets, band: str) -> Condition:
    """A matched comparison that covers too little of the band's energy tells nothing, whatever it finds."""
    support = sets.mean_support(band)
    told = replace(condition, what=f"{condition.what} ({support:.0%} of the band's energy has one)")
    if support < SMALLEST_SUPPORT:
        return replace(told, interval=Interval(condition.interval.value, math.nan, math.nan))
    return told


EXPERIMENT = Experiment(
    "function",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens", "loss_tokens", "ablation_tokens", IS_MAIN),
    tables={"removals": removals, "sets": bands, "impact": impact, "single_removals": single_removals},
    claims=judge,
)
