"""Tables of what removals of features do: one row per set, per feature, per transplant."""

from itertools import product

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from sae_stability.ablation import Effects
from sae_stability.ablation.effects import ALL, MEASURES, NONE
from sae_stability.ablation.translation import TRANSPLANTS
from sae_stability.matching import BANDS
from sae_stability.results import ablation_folder, effects_of, ensemble_of, stability_of
from sae_stability.statistics import over_seeds_and_documents
from sae_stability.store import Store
from sae_stability.tables.columns import interval_columns

KINDS = ("real", "surrogate")


def removals(store: Store, cell: str) -> pd.DataFrame:
    """One row per set, measure and reading, for the ensemble and for its surrogate."""
    parts = [shares(effects_of(store, cell, kind)[0]).assign(cell=cell, kind=kind) for kind in KINDS]
    return pd.concat(parts, ignore_index=True)


def shares(effects: Effects) -> pd.DataFrame:
    """One row per set, measure and reading: what it carries, as a share of what all features carry, and the change itself.

    Sets named `paired less matched` and `band less random` are differences of two. Ablations of the whole site have a change only.
    """
    rows = []
    for entry in effects.sums:
        measure, reading, *name = entry.split("/")
        if len(name) == 2 and tuple(name) != NONE:
            row = {"measure": measure, "reading": reading, "set": name[0], "of": name[1]}
            row |= interval_columns("share", effects.share(measure, reading, tuple(name)))
            rows.append(row | interval_columns("change", effects.raw(measure, reading, tuple(name))))
    for measure, band, (group, less) in product(MEASURES, BANDS, (("paired", "matched"), ("band", "random"))):
        if f"{measure}/removed/{group}/{band}" in effects.sums:
            apart = effects.share(measure, "removed", (group, band), less=(less, band))
            row = {"measure": measure, "reading": "removed", "set": f"{group} less {less}", "of": band}
            rows.append(row | interval_columns("share", apart))
    for ablated in ("zero", "mean"):
        row = {"measure": "prediction", "reading": ablated, "set": "site", "of": ""}
        rows.append(row | interval_columns("change", effects.site(ablated)))
    return pd.DataFrame(rows)


def sets(store: Store, cell: str) -> pd.DataFrame:
    """One row per band and seed: its size, its share of the features' energy, and how much of that has a match outside."""
    rows = []
    for kind in KINDS:
        effects, of = effects_of(store, cell, kind)
        for band in BANDS:
            for seed, number in enumerate(ensemble_of(store, cell, kind).seeds):
                inside, alive = of.members["band", band][seed], of.members[ALL][seed]
                energy = effects.energy[seed]
                rows.append(
                    {
                        "cell": cell,
                        "kind": kind,
                        "band": band,
                        "seed": number,
                        "features": int(inside.sum()),
                        "share": float(inside.sum() / alive.sum()),
                        "energy_share": float(energy[inside].sum() / energy[alive].sum()),
                        "matched": int(of.members["paired", band][seed].sum()),
                        "support": float(of.support[band][seed]),
                    }
                )
    return pd.DataFrame(rows)


def impact(store: Store, cell: str) -> pd.DataFrame:
    """One row per live feature of the ensemble: its stability, and what its removal alone does.

    Columns: `impact_reconstruction`, the share of the explained variance that is lost; `impact_prediction`, to second order, nats a
    token; `energy`, the share of all features' energy; `frequency`; and which of the matched sets it is in.
    """
    effects, of = effects_of(store, cell, "real")
    found = stability_of(store, cell, "real")
    parts = []
    for seed, number in enumerate(ensemble_of(store, cell, "real").seeds):
        live = found.alive[seed].nonzero()[:, 0]
        explained = effects.sums["reconstruction/size"].sum() - effects.sums["reconstruction/intact"][seed].sum()
        columns = {
            "cell": cell,
            "seed": number,
            "feature": live,
            "band": np.array(BANDS)[found.band[seed, live]],
            "stability": found.probability[seed, live],
            "frequency": effects.firings[seed, live] / effects.rows,
            "energy": effects.energy[seed, live] / effects.energy[seed].sum(),
            "impact_reconstruction": effects.impact[seed, live] / explained,
            "impact_prediction": effects.on_prediction[seed, live],
        }
        for band in BANDS:
            columns |= {f"{role}_{band}": of.members[role, band][seed, live] for role in ("paired", "matched")}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def single_removals(store: Store) -> pd.DataFrame:
    """Some features of the first seed of the main cell: what their removal does to the prediction, truly and by either order."""
    sample, found = load_file(ablation_folder(store, "main") / "sample.safetensors"), stability_of(store, "main", "real")
    bands = np.array(BANDS)[found.band[0, sample["feature"]]]
    columns = {"feature": sample["feature"], "band": bands, "first_order": sample["first_order"], "true": sample["true"]}
    return pd.DataFrame(columns | {"second_order": sample["first_order"] + sample["second_order"]})


def translations(store: Store) -> pd.DataFrame:
    """What became of the stable and the unstable features of each seed of the main cell in the next seed."""
    return pd.read_parquet(ablation_folder(store, "main") / "translation.parquet")


def transplants(store: Store) -> pd.DataFrame:
    """What the model loses where a band's contribution is removed, averaged, or written by another seed: nats a token."""
    rows = []
    for band in ("stable", "unstable"):
        sums = load_file(ablation_folder(store, "main") / f"transplant-{band}.safetensors")
        for what in TRANSPLANTS:
            change = over_seeds_and_documents(sums[what] - sums["intact"], sums["size"])
            rows.append({"band": band, "what": what, **interval_columns("change", change)})
    return pd.DataFrame(rows)
