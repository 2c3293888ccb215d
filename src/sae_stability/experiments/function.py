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
from torch import Tensor

from sae_stability import ablation
from sae_stability.ablation import Effects, Estimates, Impacts
from sae_stability.ablation.controls import ALL, BALANCE, NONE
from sae_stability.ablation.effects import MEASURES
from sae_stability.experiments import ensembles, impacts, matching, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import each_kind, interval_columns
from sae_stability.experiments.experiment import IS_MAIN, Experiment, Results
from sae_stability.experiments.impacts import KINDS
from sae_stability.files import save_tensors
from sae_stability.ledger import MOST, NOWHERE, OTHERWISE, Condition, Rule, judged
from sae_stability.matching import BANDS
from sae_stability.statistics import Interval, difference

SAMPLED = 8  # features of each band, of the first seed, whose impact on prediction is measured one by one
WEAK = 0.5
SMALLEST_SUPPORT = 0.3
SUPPORTED = "supported in this model if the 95 % intervals over seeds and text lie"
IDENTIFIABLE = (
    f"and where less than {SMALLEST_SUPPORT:.0%} of the band's energy has a match, or the matched energies differ by more than "
    f"{BALANCE:.0%}"
)
NOISE = (
    "that of as many random features and from the surrogate's, and for that of the impacts of single features from the "
    "surrogate's, "
)
MEANT: dict[str, tuple[Literal["reconstruction", "prediction"], str]] = {
    "C2": ("reconstruction", "explained variance"),
    "C3": ("prediction", "cross-entropy"),
}


def _carrying(claim: str) -> tuple[Rule, Rule, Rule]:
    """The three lines of C2 or C3."""
    what = MEANT[claim][1]
    again = " once codes are chosen again and the decoder is fitted again" if claim == "C2" else ""
    return (
        Rule(
            claim,
            f"Shapley share in the {what} of what reappears in another seed: the mean of what is lost without it and what is kept "
            "with it only",
            f"{SUPPORTED} above {MOST:g} for the statistic; {OTHERWISE}",
        ),
        Rule(
            claim,
            f"Shapley share in the {what} of what reappears in another seed, less that of as many random features",
            f"{SUPPORTED} above 0 for the differences of the share from {NOISE}at equal frequency; {OTHERWISE}",
            "beyond size and noise",
        ),
        Rule(
            claim,
            f"share of the {what} that is lost without the stable features that have a match in energy and frequency outside the "
            f"band, less that of their matches{again}",
            f"{SUPPORTED} above 0 for the statistic; {OTHERWISE}, {IDENTIFIABLE}",
            "beyond energy and frequency",
        ),
    )


C2, C3 = _carrying("C2"), _carrying("C3")
C4 = (
    Rule(
        "C4",
        "mean impact of an unstable feature alone on the cross-entropy, to second order, where an average other live feature has 1",
        f"{SUPPORTED} below {WEAK:g} for the statistic; {OTHERWISE}",
    ),
    Rule(
        "C4",
        "share of the cross-entropy that is lost without the unstable features, less that of as many random ones",
        f"{SUPPORTED} below 0 for the statistic; {OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C4",
        "mean impact of the unstable features that have a match in energy and frequency outside the band, less that of their "
        "matches",
        f"{SUPPORTED} below 0 for the statistic; {OTHERWISE}, {IDENTIFIABLE}",
        "beyond energy and frequency",
    ),
)


def compute(results: Results, folder: Path) -> None:
    """Remove the bands of the ensemble and of its surrogate, with their controls; on the main cell also in several orders.

    The surrogate's SAEs are judged on what they were trained on for reconstruction, and on the model's activations for prediction.
    Where a run was killed, what it had done for the ensemble stays.
    """
    site = texts.reading(results, results.study.ablation_tokens)
    cluster = site.contexts.cluster[site.contexts.is_text]
    for kind in KINDS:
        file = folder / f"{kind}.safetensors"
        if file.is_file():
            continue
        ensemble, matched = ensembles.ensemble(results, kind), matching.stability(results, kind)
        held_out = texts.activations(results, "evaluation", kind)
        detail: Literal["bands", "controls", "curves"] = (
            "bands" if kind == "surrogate" else "curves" if results.is_main else "controls"
        )
        alone = impacts.single(results, kind).impacts
        measured, removed = ablation.measure(
            encoded(results, kind), alone, matched, cluster, site, refitted_on=held_out, detail=detail
        )
        if kind == "real" and results.is_main:
            sampled, first = ablation.sample(alone, removed, SAMPLED), ensemble.of(0)
            here = ablation.impact_on_prediction(site, first)  # on the tokens on which the truth is measured
            true = ablation.true_impact_on_prediction(site, first, sampled)
            orders = {"first_order": here.first_order[0, sampled[0]], "second_order": here.second_order[0, sampled[0]]}
            save_tensors(folder / "sample.safetensors", {"feature": sampled[0], "true": true[0], **orders}, {})
        save_tensors(file, measured.tensors(), {})  # last: it says that all of this ensemble is done


def effects(results: Results, kind: str = "real") -> Estimates:
    """The effects of removals, as estimates with intervals."""
    name = f"{kind}.safetensors"
    return _estimates(*(results.folder(stage) / name for stage in ("function", "impacts", "matching")), results.cell.threshold)


@lru_cache(maxsize=2)  # tables and claims ask for the same, and sets without each seed take a while
def _estimates(measured: Path, alone: Path, matched: Path, threshold: float) -> Estimates:
    return Estimates(Effects.of(load_tensors(measured)), Impacts(**load_tensors(alone)), matching.opened(matched, threshold))


def removals(results: Results) -> pd.DataFrame:
    """One row per set, measure and reading, for the ensemble and for its surrogate."""
    return each_kind(KINDS, lambda kind: shares(effects(results, kind)))


def shares(estimates: Estimates) -> pd.DataFrame:
    """One row per set, measure and reading: what it carries, as a share of what all features carry, and the change itself.

    Sets named `paired less matched` and `band less random` are differences of two. Readings `shapley` are Shapley shares: of each
    band among the three, and of what reappears in another seed. Ablations of the whole site have a change only.
    """
    rows: list[dict] = []
    sums = estimates.effects.sums
    for entry in sums:
        measure, reading, *name = entry.split("/")
        if len(name) == 2 and tuple(name) != NONE:
            members = (name[0], name[1])
            row = {"measure": measure, "reading": reading, "set": name[0], "of": name[1]}
            share, change = estimates.share(measure, reading, members), estimates.raw(measure, reading, members)
            rows.append({**row, **interval_columns("share", share), **interval_columns("change", change)})
    for measure, band, (group, less) in product(MEASURES, BANDS, (("paired", "matched"), ("band", "random"))):
        if {f"{measure}/removed/{group}/{band}", f"{measure}/removed/{less}/{band}"} <= sums.keys():
            apart = estimates.share(measure, "removed", (group, band), less=(less, band))
            row = {"measure": measure, "reading": "removed", "set": f"{group} less {less}", "of": band}
            rows.append({**row, **interval_columns("share", apart)})
    for measure in ("reconstruction", "prediction"):
        row = {"measure": measure, "reading": "shapley"}
        returning = {"returns": estimates.returning(measure), "returns less random": estimates.returning(measure, less_random=True)}
        rows += [{**row, "set": name, "of": "", **interval_columns("share", share)} for name, share in returning.items()]
        for band in BANDS:
            rows.append({**row, "set": "band", "of": band, **interval_columns("share", estimates.shapley(measure, band))})
    for ablated in ("zero", "mean"):
        row = {"measure": "prediction", "reading": ablated, "set": "site", "of": ""}
        rows.append({**row, **interval_columns("change", estimates.site(ablated))})
    return pd.DataFrame(rows)


def bands(results: Results) -> pd.DataFrame:
    """One row per band and seed: its size, its share of the features' energy, and how much of that has a match outside."""

    def rows(kind: str) -> pd.DataFrame:
        estimates = effects(results, kind)
        energy, members, table = estimates.impacts.energy, estimates.sets.members, []

        def share(part: Tensor, whole: Tensor, seed: int) -> float:
            total = energy[seed, whole].sum()
            return float(energy[seed, part].sum() / total) if total > 0 else math.nan

        for band, (position, seed) in product(BANDS, enumerate(ensembles.ensemble(results, kind).seeds)):
            inside, paired, matched = (members[role, band][position] for role in ("band", "paired", "matched"))
            alive = members[ALL][position]
            row = {"band": band, "seed": seed, "features": int(inside.sum()), "share": float(inside.sum() / alive.sum())}
            row |= {"energy_share": share(inside, alive, position), "matched": int(paired.sum())}
            table.append(row | {"support": share(paired, inside, position), "energy_ratio": share(paired, matched, position)})
        return pd.DataFrame(table)

    return each_kind(KINDS, rows)


def impact(results: Results) -> pd.DataFrame:
    """One row per live feature of the ensemble: its stability, and what its removal alone does.

    Columns: `impact_reconstruction`, the share of the explained variance that is lost; `impact_prediction`, to second order, nats a
    token; `energy`, the share of all features' energy; `frequency`; and which of the matched sets it is in.
    """
    estimates, matched = effects(results), matching.stability(results)
    measured, alone, members, parts = estimates.effects, estimates.impacts, estimates.sets.members, []
    for position, seed in enumerate(ensembles.ensemble(results).seeds):
        live = matched.alive[position].nonzero()[:, 0]
        explained = measured.sums["reconstruction/size"].sum() - measured.sums["reconstruction/intact"][position].sum()
        columns = {
            "seed": seed,
            "feature": live,
            "band": np.array(BANDS)[matched.band[position, live]],
            "stability": matched.probability[position, live],
            "frequency": alone.firings[position, live] / alone.rows,
            "energy": alone.energy[position, live] / alone.energy[position].sum(),
            "impact_reconstruction": alone.reconstruction[position, live] / explained,
            "impact_prediction": alone.on_prediction[position, live],
        }
        for band in BANDS:
            columns |= {f"{role}_{band}": members[role, band][position, live] for role in ("paired", "matched")}
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
    real, surrogate = effects(results), effects(results, "surrogate")
    return [*judge_carrying("C2", real, surrogate), *judge_carrying("C3", real, surrogate), *judge_c4(real, surrogate)]


def judge_carrying(claim: str, real: Estimates, surrogate: Estimates) -> list[dict]:
    """C2 or C3 on one cell. The null's value is the surrogate's, whose SAEs read the model's activations for the prediction."""
    measure = MEANT[claim][0]
    stated, beyond_size, beyond_energy = C2 if claim == "C2" else C3
    share, null = real.returning(measure), surrogate.returning(measure)
    less_random, alone = real.returning(measure, less_random=True), real.single.share(measure)
    equal = impacts.null_at_equal_frequency(real.single, surrogate.single, measure)
    sizes = [
        Condition("Shapley share of what reappears, less that of as many random features", less_random, 0.0),
        Condition("Shapley share of what reappears, less the surrogate's", difference(share, null), 0.0),
        Condition(
            "impacts of single features that reappear, less the surrogate's at equal frequency", difference(alone, equal), 0.0
        ),
    ]
    read = "reselected" if claim == "C2" else measure
    apart = real.share(read, "removed", ("paired", "stable"), less=("matched", "stable"))
    what = "lost without stable features that have a match, less that of their matches"
    most = Condition("Shapley share of what reappears in another seed", share, MOST, no_effect=0.0)
    return [
        judged(stated, share, null, [most]),
        judged(beyond_size, less_random, surrogate.returning(measure, less_random=True), sizes),
        judged(beyond_energy, apart, NOWHERE, [_identified(Condition(what, apart, 0.0), real, "stable")]),
    ]


def judge_c4(real: Estimates, surrogate: Estimates) -> list[dict]:
    """C4 on one cell: a weak marginal impact."""
    stated, beyond_size, beyond_energy = C4
    unstable = ("band", "unstable")
    impact = real.impact(unstable)
    less_random = real.share("prediction", "removed", unstable, less=("random", "unstable"))
    apart = real.impact(("paired", "unstable"), less=("matched", "unstable"))
    what = "impact of unstable features that have a match, less that of their matches"
    null = surrogate.share("prediction", "removed", unstable, less=("random", "unstable"))
    return [
        judged(
            stated,
            impact,
            surrogate.impact(unstable),
            [Condition("impact of an unstable feature, over that of the others", impact, WEAK, below=True, no_effect=1.0)],
        ),
        judged(beyond_size, less_random, null, [Condition("lost without unstable, less random", less_random, 0.0, below=True)]),
        judged(beyond_energy, apart, NOWHERE, [_identified(Condition(what, apart, 0.0, below=True), real, "unstable")]),
    ]


def _identified(condition: Condition, real: Estimates, band: str) -> Condition:
    """A matched comparison that covers too little of the band's energy, or is out of balance, tells nothing, whatever it finds."""
    support, balance = real.support(band), real.balance(band)
    told = f"{condition.what} ({support:.0%} of the band's energy has one"
    told += ")" if math.isnan(balance) else f"; energies differ by {balance:+.1%})"
    if support < SMALLEST_SUPPORT or not abs(balance) <= BALANCE:
        return replace(condition, what=told, interval=Interval(condition.interval.value, math.nan, math.nan))
    return replace(condition, what=told)


EXPERIMENT = Experiment(
    "function",
    compute,
    after=("matching", "impacts"),
    reads=("threshold", "evaluation_tokens", "ablation_tokens", IS_MAIN),
    tables={
        "removals": removals,
        "sets": bands,
        "impact": impact,
        "single_removals": single_removals,
    },
    claims=judge,
)
