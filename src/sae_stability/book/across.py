"""What the studies at hand say of cells that differ from the main one: which cells there are, and what each finds (C10)."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import get_args

import pandas as pd

from sae_stability.book import page
from sae_stability.book.tables import Tables
from sae_stability.experiments import generality
from sae_stability.language.activations import layer_of
from sae_stability.ledger import Line
from sae_stability.random_effects import crossed
from sae_stability.study import Cell, model_name

AXES = {
    "seeds": (),
    "variant": ("variant",),
    "site": ("model", "hook_name"),
    "length": ("tokens", "passes"),
    "width": ("d_sae", "k"),
}
"""What a cell can differ in from the main one, by the keys that say so."""
SEVERAL = "several or else"
"""The axis of a cell that differs in more than one of them, or in what is none of them, such as its text."""
SHARED = ("model", "hook_name", "variant", "d_sae", "k")
"""What cells can have in common, so that they are no draws of their own: columns of `cells`."""
APART = {"seeds", "surrogate_seeds", "nulls"}
"""Keys that say how often a cell is trained, and beside what."""


def cells(studies: Sequence[Tables], main: Cell) -> pd.DataFrame:
    """The cells of some studies, what is trained twice by the same seeds once: one row each, by what it differs in from a main one.

    Columns: study, cell, axis (a key of `AXES`, or `SEVERAL`), name (for readers), model, corpus, saes, active (features that are
    active on a token), tokens, and the others of `SHARED`.
    """
    rows, seen = [], list[Cell]()
    for study in studies:
        table = study.table("cells", every_cell=True).set_index("cell")
        for id, active in table["l0"].items():
            cell = study.study.cells[str(id)]
            if not any(_alike(cell, other) and set(cell.seed_list) & set(other.seed_list) for other in seen):
                seen.append(cell)
                axis = _axis(cell, main)
                name = f"{study.study.name}: {study.study.names[cell.id]}" if axis == SEVERAL else _name(cell, main)
                row = {"study": study.study.name, "cell": id, "axis": axis, "name": name}
                row |= {"model": model_name(cell.model), "corpus": cell.corpus, "saes": len(cell.seed_list), "active": active}
                row |= {"tokens": cell.tokens * cell.passes, "hook_name": cell.hook_name, "variant": cell.variant}
                rows.append(row | {"d_sae": cell.d_sae, "k": cell.k})
    found, order = pd.DataFrame(rows), [*AXES, SEVERAL]
    found = found.assign(place=found["axis"].map(order.index)).sort_values(["place", "tokens", "active", "d_sae"], kind="stable")
    return found.drop(columns="place").reset_index(drop=True)


def effects(studies: Iterable[Tables], chosen: pd.DataFrame) -> pd.DataFrame:
    """What each of the chosen `cells` finds of each line (`generality.effects`), with the columns of `cells`, in their order."""
    found = [generality.effects(study.ledger, study.study).assign(study=study.study.name) for study in studies]
    return chosen.reset_index(names="position").merge(pd.concat(found), on=["study", "cell"]).sort_values("position", kind="stable")


def verdicts(studies: Sequence[Tables], chosen: pd.DataFrame) -> str:
    """The scoreboards of all cells side by side: a row a cell, a column a claim, in it a sign for each of its lines."""
    ledgers = {study.study.name: study for study in studies}

    def signs(row: pd.Series, claim: str) -> str:
        lines = {line["line"]: line["verdict"] for line in ledgers[row["study"]].claims(claim, row["cell"])}
        return "\u202f".join(page.SIGNS[lines[line]] if line in lines else page.SIGNS["not tested"] for line in get_args(Line))

    columns: dict[str, page.Column] = {"differs in": "{axis}", "cell": "{name}"}
    columns |= {claim: partial(signs, claim=claim) for claim in generality.ASKED}
    return page.markdown_table(chosen, columns)


def over_draws(study: Tables, claim: str) -> str:
    """The conditions of a claim over the draws of a study's main cell, which are its cells, line by line."""
    means = generality.over_draws(line for id in study.study.cells for line in study.claims(claim, id))
    columns: dict[str, page.Column] = {
        "line": "{line}",
        "condition": "{what}",
        "mean over draws, 95 % interval": partial(page.interval, name="value"),
        "bound": lambda row: f"{'below' if row['below'] else 'above'} {row['bound']:g}",
        " ": lambda row: page.MET[row["met"]],
        "met in": "{met_in} of {draws}",
    }
    return page.markdown_table(means, columns)


def draws(study: Tables, claim: str, line: str) -> pd.DataFrame:
    """The conditions of a line of a claim on every draw of a study's main cell, and last their mean: rows of `figures.forest`.

    Columns: id (the condition), line, position, name (the seeds of the draw), axis, value, low, high, bound and margin.
    """
    cells = study.study.cells
    lines = [study.claim(claim, id, line) for id in cells]
    names = [f"seeds {min(cell.seed_list)} to {max(cell.seed_list)}" for cell in cells.values()]
    single = [
        {"id": part["what"], "position": position, "name": name, "axis": "draw", "value": part["value"], "bound": part["bound"]}
        | {"low": part["ci_low"], "high": part["ci_high"], "below": part["below"]}
        for position, (name, each) in enumerate(zip(names, lines, strict=True))
        for part in each["conditions"]
    ]
    means = generality.over_draws(lines).rename(columns={"what": "id", "value_low": "low", "value_high": "high"})
    means = means.assign(position=len(cells), name="mean of draws", axis="mean")
    found = pd.concat([pd.DataFrame(single), means[list(single[0])]], ignore_index=True).assign(line=line)
    return found.assign(margin=(found["value"] - found["bound"]) * (1 - 2 * found["below"].astype(int)))


def combined(found: pd.DataFrame) -> pd.DataFrame:
    """Each line of each claim over all cells of `effects`, one row each, by `id` and `line`.

    Columns: those of `generality.together`; and with what cells share (`random_effects.crossed`) the mean, `shared`, and by how
    much they differ along each axis, `spread_by`.
    """
    rows = []
    for (claim, line), part in found.groupby(["id", "line"]):
        margin, error, degrees = (part[name].to_numpy() for name in ("margin", "error", "degrees"))
        whole = generality.together(margin, error, degrees)
        shared = crossed(margin, error, part[list(SHARED)])
        rows.append({"id": claim, "line": line, **whole._asdict(), "shared": shared.mean, "spread_by": shared.spread})
    order = {line: place for place, line in enumerate(get_args(Line))}
    table = pd.DataFrame(rows, columns=["id", "line", *generality.Together._fields, "shared", "spread_by"])
    return table.sort_values(["id", "line"], key=lambda column: column.map(order) if column.name == "line" else column)


def _alike(cell: Cell, other: Cell) -> bool:
    """Whether two cells train the same."""
    return cell.model_dump(exclude=APART) == other.model_dump(exclude=APART)


def _axis(cell: Cell, main: Cell) -> str:
    """What a cell differs in from the main one."""
    differing = {key for key in Cell.model_fields if getattr(cell, key) != getattr(main, key)} - APART
    return next((axis for axis, keys in AXES.items() if differing <= set(keys)), SEVERAL)


def _name(cell: Cell, main: Cell) -> str:
    """What readers call a cell: in what it differs from the main one."""
    told: list[str] = [cell.variant] if cell.variant != main.variant else []
    if cell.model != main.model:
        told.append(model_name(cell.model))
    elif cell.hook_name != main.hook_name:
        told.append(f"layer {layer_of(cell.hook_name)}")
    if (cell.tokens, cell.passes) != (main.tokens, main.passes):
        told.append(f"{cell.tokens * cell.passes / 1e6:g} M tokens")
    if (cell.d_sae, cell.k) != (main.d_sae, main.k):
        told.append(f"{cell.d_sae:,} features (k {cell.k})")
    if told:
        return ", ".join(told)
    if cell.seed_list == main.seed_list:
        return "main cell"
    return f"{len(cell.seed_list)} {'' if set(cell.seed_list) & set(main.seed_list) else 'fresh '}seeds"
