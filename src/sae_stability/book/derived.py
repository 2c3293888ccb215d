"""What chapters derive from the results of a study, beyond its tables: quantities, comparisons and groups. Pages print them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from sae_stability.book.tables import Tables
from sae_stability.diagnostics import diagnose
from sae_stability.experiments import Results, ensembles, matching, texts
from sae_stability.experiments import stability as tables
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.subspaces import RANDOM
from sae_stability.explanations import agreement, says_surface
from sae_stability.matching import BANDS, Banding, Stability
from sae_stability.statistics import Interval, difference, jackknife
from sae_stability.study import Cell, Study
from sae_stability.subspaces import WRITTEN
from sae_stability.triggers import over_seeds


class RandomCosines(NamedTuple):
    """What the cosines of random directions are like."""

    spread: float
    """Standard deviation of the cosine of two."""
    above: float
    """Probability that the cosine of two reaches the threshold."""
    best: float
    """Median of the best cosine of one with all features of a dictionary of random directions."""


def random_cosines(threshold: float, d_in: int, d_sae: int) -> RandomCosines:
    """How close random directions come to one another.

    The squared cosine of two uniform directions in `d_in` dimensions has the distribution Beta(1/2, (d_in - 1)/2).
    """
    squared = stats.beta(0.5, (d_in - 1) / 2)
    one_below = 0.5 ** (1 / d_sae)  # the best of d_sae lies below its median with probability one half
    return RandomCosines(d_in**-0.5, 0.5 * squared.sf(threshold**2), squared.isf(2 * (1 - one_below)) ** 0.5)


def d_in(results: Results) -> int:
    """The dimension of the activations of a cell."""
    return ensembles.ensemble(results).W_dec.shape[2]


def model_dtype(results: Results) -> str:
    """In which dtype the cell's language model computes here."""
    return str(texts.model_dtype(results.store.study, results.cell)).removeprefix("torch.")


def stability_by_kind(results: Results, threshold: float) -> dict[str, Stability]:
    """The stability of the ensemble of a cell (`real`) and of its nulls, judged at a threshold."""
    return {kind: matching.stability(results, kind).at(threshold) for kind in results.cell.kinds}


def typical_features(results: Results, threshold: float) -> pd.DataFrame:
    """A stable and an unstable feature of the first seed, each in the middle of its band by the mean of its best cosines.

    One row a feature and other seed, nothing of a band that is empty. Columns: band, feature, cosine (the best in that seed).
    """
    found = matching.stability(results, "real").at(threshold)
    best, band, rows = found.best_cosine[0, 1:].numpy(), found.band[0], []
    for name in ("stable", "unstable"):
        members = np.flatnonzero(band == BANDS.index(name))
        if len(members):
            middle = members[np.argsort(best[:, members].mean(0), kind="stable")[len(members) // 2]]
            rows += [{"band": name, "feature": int(middle), "cosine": float(cosine)} for cosine in best[:, middle]]
    return pd.DataFrame(rows, columns=["band", "feature", "cosine"])


def reappearance_curves(results: Results, kinds: Iterable[str], cosines: Iterable[float]) -> pd.DataFrame:
    """How often unstable features come back in another seed at any cosine: a row a kind and cosine.

    Bands of a pair of seeds come from the others, so that takes three, and an interval four. Columns: kind, cosine, and p with the
    ends of its interval.
    """
    rows, cosines = [], list(cosines)
    for kind in kinds:
        found = matching.stability(results, kind)
        if found.trials < 2:
            continue
        shares = cache(partial(_unstable_back, found, cosines))

        def share_back(kept: list[int], position: int, shares: Callable[[tuple[int, ...]], np.ndarray] = shares) -> float:
            return float(shares(tuple(kept))[position])

        for position, cosine in enumerate(cosines):
            share = jackknife(partial(share_back, position=position), len(found.alive)).within(0, 1)
            rows.append({"kind": kind, "cosine": cosine, **interval_columns("p", share)})
    return pd.DataFrame(rows, columns=["kind", "cosine", "p", "p_low", "p_high"])


def _unstable_back(found: Stability, cosines: list[float], kept: tuple[int, ...]) -> Float[np.ndarray, "cosine"]:
    """The share of unstable features that another seed has at each cosine, on average over pairs of some seeds (positions)."""
    unstable = found.held_out_band_among(list(kept)) == BANDS.index("unstable")
    best = np.where(unstable, found.best_cosine.numpy()[np.ix_(kept, kept)], np.nan)
    members = unstable.sum(2)
    some = members > 0
    return np.array([((best >= cosine).sum(2)[some] / members[some]).mean() if some.any() else np.nan for cosine in cosines])


def lines_in_plane(x: Iterable[float], y: Iterable[float], apart: float = 10.0) -> int:
    """Along how many lines some directions of a plane lie, whichever way: neighbours within some degrees are of one line."""
    angles = np.sort(np.degrees(np.arctan2(np.asarray(y), np.asarray(x))) % 180)
    gaps = np.diff(angles, append=angles[0] + 180)
    return max(1, int((gaps > apart).sum()))


def unstable_diagnosed(results: Results, names: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """What `diagnose` tells of the unstable features of the ensemble and its nulls, by their `names`: of as many seeds
    and features of each; nothing where there are fewer than four seeds."""
    found = {kind: matching.stability(results, kind) for kind in names if kind in results.cell.kinds}
    seeds = min(matched.trials for matched in found.values()) + 1
    if seeds < 4:
        return {}
    found = {kind: matched.among(list(range(seeds))) for kind, matched in found.items()}
    sizes = np.min([(matched.band == BANDS.index("unstable")).sum(1) for matched in found.values()], axis=0).tolist()
    return {names[kind]: diagnose(ensembles.ensemble(results, kind).W_dec[:seeds], each, sizes) for kind, each in found.items()}


def live_features(results: Results, threshold: float) -> pd.DataFrame:
    """The rows of table `features` of a cell's ensemble, judged at a threshold; dead features take no part."""
    features = tables.features_at(results, "real", threshold)
    return features[features["alive"]].reset_index(drop=True)


def at_equal_seeds(results: Results, threshold: float) -> pd.DataFrame:
    """Matches of each live feature in studies of as many seeds as the smallest ensemble has. Columns: kind, matches, trials."""
    return tables.at_equal_seeds(results, threshold)


def grid_at_equal_seeds(study: Tables) -> pd.DataFrame:
    """The same of each cell of the grid and its surrogate, at its own threshold, with what tells the cell apart as `name`."""
    counts = study.others("counts")
    return one_a_feature(counts[counts["kind"].isin(["real", "surrogate"])])[["name", "kind", "matches", "trials"]]


def one_a_feature(counts: pd.DataFrame) -> pd.DataFrame:
    """The table `counts`, or rows of it, with a row for each of the features that it counts."""
    return counts.loc[counts.index.repeat(counts["features"])].reset_index(drop=True)


def share_back_everywhere(features: pd.DataFrame) -> pd.Series:
    """The share of features that come back in every other seed, by kind. Columns: kind, matches, trials."""
    return (features["matches"] == features["trials"]).groupby(features["kind"], sort=False).mean()


def compared(mean: Interval, null: Interval) -> str:
    """Whether more comes back in the model than in a null, in words that follow the difference of the two means."""
    apart = difference(mean, null)
    if np.isnan(apart.low):
        return "has no interval: seeds are few"
    if apart.low > 0:
        return "says that more comes back in the model"
    return "says that more comes back in this null" if apart.high < 0 else "does not tell the two apart"


def seeds_needed(by_seeds: pd.DataFrame, within: float) -> int | None:
    """From how many seeds on the fitted share of stable features is known within `within` on either side; None where it never is.

    Columns: seeds, latent_stable_share_low and _high; its rows are in the order of seeds.
    """
    reach = (by_seeds["latent_stable_share_high"] - by_seeds["latent_stable_share_low"]) / 2
    known = (reach <= within)[::-1].cummin()[::-1]  # there, and with more seeds too
    return int(by_seeds.loc[known, "seeds"].iloc[0]) if known.any() else None


def settled(before: pd.Series, last: pd.Series, column: str, within: float) -> str:
    """Whether a quantity has settled between two rows, in words: only where its whole change is known to lie within a margin.

    The two are taken as independent, which makes the interval of their difference wider where they share seeds.
    """
    was, now = (Interval(*(float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))) for row in (before, last))
    change = difference(now, was)
    if np.isnan(change.low):
        return "cannot be told: seeds are few"
    if -within < change.low and change.high < within:
        return f"has settled within {within:g}"
    if change.low > 0:
        return "still rises"
    return "still falls" if change.high < 0 else "is not known to have settled"


def share_in_families(families: pd.DataFrame, size: int) -> float:
    """The share of features whose family has `size` members. Columns: size; one row a family."""
    return families.loc[families["size"] == size, "size"].sum() / families["size"].sum()


def with_live_features(unique: pd.DataFrame, features: pd.DataFrame) -> pd.DataFrame:
    """The table `unique` with how many live features a seed has on average, by kind, as the column `features`."""
    living = features[features["alive"]].groupby("kind")["seed"].agg(["size", "nunique"])
    return unique.assign(features=unique["kind"].map(living["size"] / living["nunique"]))


def frequency_correlations(features: pd.DataFrame) -> pd.Series:
    """Spearman's rank correlation of stability and firing frequency, by seed. Columns: seed, frequency, stability."""
    ranks = features.groupby("seed")[["frequency", "stability"]].rank()
    return ranks.groupby(features["seed"]).apply(lambda seed: seed["frequency"].corr(seed["stability"]))


def keys_that_differ(study: Study) -> list[str]:
    """The keys in which some cell of the grid differs from the main one, in the order of the schema."""
    cells = list(study.cells.values())
    return [key for key in Cell.model_fields if any(getattr(cell, key) != getattr(cells[0], key) for cell in cells)]


def training_ends(curve: pd.DataFrame) -> pd.DataFrame:
    """Explained variance at the end of training, by kind: min, max, and size, the number of seeds.

    Columns of `curve`: kind, tokens, explained_variance; one row a seed and point. Seeds that diverged have no end.
    """
    last = curve[curve["tokens"] == curve["tokens"].max()]
    return last.groupby("kind", sort=False)["explained_variance"].agg(["min", "max", "size"])


def what_comes_back(studies: Iterable[Tables]) -> pd.DataFrame:
    """How much of each weight comes back in another seed, on every cell of some studies: a row a cell, the same SAEs once.

    Columns: study, name (what tells the cell apart), seeds, and for each kind and weight of the table `reappearing` KIND/WEIGHT,
    with its ends KIND/WEIGHT_low and so on.
    """
    rows: dict[str, dict] = {}
    for each in studies:
        table = each.table("reappearing", every_cell=True)
        for (cell, name), of_cell in each.named(table).groupby(["cell", "name"], sort=False):
            asked = each.study.cells[cell]
            row: dict = {"study": each.study.name, "name": name, "seeds": len(asked.seed_list)}
            for _, found in of_cell.iterrows():
                row |= {f"{found['kind']}/{found['weight']}{end}": found[f"share{end}"] for end in ("", "_low", "_high")}
            rows.setdefault(asked.model_dump_json(exclude={"nulls"}), row)
    return pd.DataFrame(list(rows.values()))


def shared_curves(study: Tables) -> dict[str, pd.DataFrame]:
    """How much of what a set of features writes lies in the subspace of another seed's set, of what lies in its own, at each rank:
    unstable features, and beside them random directions and features of noise, by names for readers; those that the study has, and
    none where it has no unstable ones.
    """
    rows = study.table("subspaces")
    if rows.empty:
        return {}
    rows = rows[rows["quantity"].eq("share of ceiling") & rows["coordinates"].eq(WRITTEN)].sort_values("rank")
    sets = {
        "unstable features, in those of another seed": ("real", "unstable"),
        "random directions of the same covariance and energies": ("real", RANDOM),
        "features of noise, most alike in energy and frequency": ("surrogate", "alike"),
    }
    curves = {name: rows[rows["kind"].eq(kind) & rows["of"].eq(of) & rows["by"].eq(of)] for name, (kind, of) in sets.items()}
    first = next(iter(sets))
    return {name: curve for name, curve in curves.items() if len(curve)} if len(curves[first]) else {}


def curves_in_words(curves: Mapping[str, pd.DataFrame]) -> str:
    """The numbers of such curves, for whoever does not see them."""
    told = []
    for name, curve in curves.items():
        numbers = ", ".join(f"{row.value:.2f} at rank {row.rank}" for row in curve.dropna(subset="value").itertuples())
        told.append(f"{name}: {numbers or 'not defined'}.")
    return " ".join(told)


def cells_with_means(study: Tables) -> pd.DataFrame:
    """Every row of the table `cells`, with the means over its SAEs of loss_recovered, dead_share and training_seconds."""
    cells, saes = study.table("cells", every_cell=True), study.table("saes", every_cell=True)
    means = saes.groupby("cell")[["loss_recovered", "dead", "training_seconds"]].mean()
    cells = cells.assign(**{name: cells["cell"].map(mean) for name, mean in means.items()})
    return cells.assign(dead_share=cells["dead"] / cells["d_sae"])


def variants_side_by_side(study: Tables) -> list[pd.DataFrame]:
    """The cells that share everything but their variant, in groups of two or more: rows of `cells_with_means` and their name."""
    groups: dict[str, list[str]] = {}
    for cell in study.study.cells.values():
        groups.setdefault(cell.model_dump_json(exclude={"variant"}), []).append(cell.id)
    cells = cells_with_means(study)
    return [study.named(cells[cells["cell"].isin(group)]) for group in groups.values() if len(group) > 1]


def verdicts_by_claim(ledger: Iterable[dict]) -> str:
    """On how many cells which verdict fell on each claim as stated; what was not tested is left out."""
    fallen: dict[str, Counter] = {}
    for line in ledger:
        if line["line"] == "as stated" and line["verdict"] != "not tested":
            fallen.setdefault(line["id"], Counter())[line["verdict"]] += 1
    return "; ".join(
        f"{claim} " + ", ".join(f"*{verdict}* in {count} of {counts.total()}" for verdict, count in counts.most_common())
        for claim, counts in fallen.items()
    )


def where_verdicts_fall(ledger: Iterable[dict], names: Mapping[str, str]) -> str:
    """As a list: of each claim as stated, which verdict fell on which cells, by their names and in their order."""
    fallen: dict[str, dict[str, list[str]]] = {}
    place = list(names).index
    for line in sorted((line for line in ledger if line["cell"] in names), key=lambda line: place(line["cell"])):
        if line["line"] == "as stated" and line["verdict"] != "not tested":
            fallen.setdefault(line["id"], {}).setdefault(line["verdict"], []).append(names[line["cell"]])
    told = []
    for claim, of in sorted(fallen.items()):
        where = [f"*{verdict}* at {', '.join(cells)}" for verdict, cells in of.items()]
        told.append(f"- {claim}: " + ("; ".join(where) if len(where) > 1 else f"*{next(iter(of))}* at all"))
    return "\n".join(told)


def by_earlier_rules(here: Iterable[dict], there: Iterable[dict]) -> str:
    """Which claims of another ledger were judged by other rules than those of this one; nothing where none was."""
    rules = {(line["id"], line["line"]): line["rule"] for line in here}
    changed = {line["id"] for line in there if line["rule"] and line["rule"] != rules.get((line["id"], line["line"]), line["rule"])}
    if not changed:
        return ""
    return f"There {', '.join(sorted(changed))} was judged by an earlier rule ({{doc}}`rules` says what changed)."


def with_reports(stages: pd.DataFrame) -> pd.DataFrame:
    """Stages, each with the report on it: seconds add up, and the larger peak of memory counts.

    Columns: name, seconds, peak_memory_gb. A report's name is that of its stage and `/report`.
    """
    names = stages["name"].str.removesuffix("/report")
    return stages.groupby(names, sort=False).agg({"seconds": "sum", "peak_memory_gb": "max"}).reset_index()


def side_by_side(removals: pd.DataFrame, names: Mapping[str, tuple[str, str, str]], kind: str = "real") -> pd.DataFrame:
    """Several removals of each band in one row; `names` says which (measure, reading, set) of the table stands under which name.

    Columns: band, and for each name NAME_share and NAME_change, with their ends NAME_share_low and so on.
    """
    estimates = [f"{column}{end}" for column in ("share", "change") for end in ("", "_low", "_high")]
    table = removals[removals["kind"] == kind].set_index(["measure", "reading", "set", "of"])[estimates]
    rows = []
    for band in BANDS:
        parts = [table.loc[(*removal, band)].add_prefix(f"{name}_") for name, removal in names.items()]
        rows.append(pd.concat([pd.Series({"band": band}), *parts]))
    return pd.DataFrame(rows).infer_objects()


def band_sizes(sets: pd.DataFrame, kind: str = "real") -> pd.DataFrame:
    """The share of each band among features and in their energy, how much of that energy has a match, and its ratio to the matches'
    energy: means over seeds."""
    sizes = sets[sets["kind"] == kind].groupby("band")[["share", "energy_share", "support", "energy_ratio"]]
    return sizes.mean().reindex(BANDS)


def matched_comparisons(removals: pd.DataFrame, sets: pd.DataFrame, measures: Iterable[str]) -> pd.DataFrame:
    """Each band beside its matches: one row a measure and band of which some energy has a match.

    Columns: measure, band, support, and `side_by_side`'s for paired, matched and difference.
    """
    roles = {"paired": "paired", "matched": "matched", "difference": "paired less matched"}
    parts = []
    for measure in measures:
        compared = side_by_side(removals, {name: (measure, "removed", members) for name, members in roles.items()})
        parts.append(compared.assign(measure=measure))
    compared = pd.concat(parts, ignore_index=True).merge(band_sizes(sets)["support"], left_on="band", right_index=True)
    return compared[compared["support"] > 0]


def kept_by_order(removals: pd.DataFrame, measures: Iterable[str]) -> pd.DataFrame:
    """What is kept as features are added in several orders, from none of them to all.

    Columns: measure, order, added (the share of the features), share, share_low, share_high.
    """
    kept = removals[(removals["kind"] == "real") & (removals["reading"] == "kept") & removals["measure"].isin(list(measures))]
    kept = kept[kept["set"].str.startswith("by ")]
    kept = kept.assign(order=kept["set"].str.removeprefix("by "), added=kept["of"].astype(float))
    shares = ["share", "share_low", "share_high"]
    curves = [kept[["measure", "order", "added", *shares]]]
    for end in (0.0, 1.0):  # without any feature nothing is kept, and with all of them everything
        curves.append(kept[["measure", "order"]].drop_duplicates().assign(added=end, **dict.fromkeys(shares, end)))
    return pd.concat(curves, ignore_index=True)


def rank_correlations(features: pd.DataFrame, quantity: str, others: list[str]) -> pd.Series:
    """Spearman's rank correlation of a quantity with each of `others` over the features of a seed, on average over seeds.

    Seeds in which one of the two is the same for all features have no part; NaN where all are such.
    """
    by_seed = features.groupby("seed")[[quantity, *others]].corr("spearman")[quantity].unstack()
    return by_seed[others].mean()


def order_errors(sample: pd.DataFrame) -> pd.DataFrame:
    """How far approximate changes of the cross-entropy are from the true ones, by their order.

    Columns: rank_correlation (Spearman's), error: the sum of the absolute differences, by that of the absolute true changes.
    """
    orders = ["first_order", "second_order"]
    differences = sample[orders].sub(sample["true"], axis=0)
    ranks = sample[[*orders, "true"]].corr("spearman")["true"]
    return pd.DataFrame({"rank_correlation": ranks[orders], "error": differences.abs().sum() / sample["true"].abs().sum()})


def shares_by_band(features: pd.DataFrame, column: str, names: Iterable[str]) -> pd.DataFrame:
    """The share of each band's features that has each of `names` in a column: a row a band that has features, a column a name."""
    shares = features.groupby("band")[column].value_counts(normalize=True).unstack(fill_value=0)
    present = [band for band in BANDS if band in shares.index]
    return shares.reindex(index=present, columns=list(names), fill_value=0.0)


def explanation_scores(explanations: pd.DataFrame) -> pd.DataFrame:
    """How well explanations tell when features fire, by engine and band: means over features.

    Columns: engine, band, features (how many), f1, precision, recall, balanced_accuracy, surface (share of surface form).
    """
    by_band = explanations.groupby(["engine", "band"])
    scores = by_band[["f1", "precision", "recall", "balanced_accuracy", "surface"]].mean()
    scores.insert(0, "features", by_band.size())
    order = [(engine, band) for engine in explanations["engine"].unique() for band in BANDS if (engine, band) in scores.index]
    return scores.reindex(order).reset_index()


def f1_difference(explanations: pd.DataFrame, bands: Banding) -> Interval:
    """The mean F1 of unstable features less that of stable ones: of each seed that has both, the mean over seeds, jackknifed."""

    def of_seed(part: pd.DataFrame) -> float:
        unstable, stable = (part.loc[part["band"] == band, "f1"].mean() for band in ("unstable", "stable"))
        return float(unstable - stable)

    return bands.jackknife(explanations, lambda part: over_seeds(part, of_seed))


def classifier_agreement(labelled: pd.DataFrame) -> pd.DataFrame:
    """How well the rule that tells explanations of surface form agrees with labels: a row for each source of texts and for all.

    Columns: source, texts, surface (how many are labelled so), share and kappa, with their ends share_low and so on.
    """
    answers = labelled["text"].map(says_surface)
    rows = []
    for source in [*labelled["source"].unique(), "all"]:
        chosen = (labelled["source"] == source) | (source == "all")
        labels = labelled.loc[chosen, "surface"].to_numpy()
        agreed = agreement(labels, answers[chosen].to_numpy())
        columns = {**interval_columns("share", agreed.share), **interval_columns("kappa", agreed.kappa)}
        rows.append({"source": source, "texts": len(labels), "surface": labels.sum(), **columns})
    return pd.DataFrame(rows)


def best_middle_worst(explanations: pd.DataFrame) -> pd.DataFrame:
    """The rows of the best, the middle and the worst explanation of each band, by F1; fewer where a band has fewer."""
    chosen, by_f1 = [], explanations.sort_values("f1", ascending=False)
    for band in BANDS:
        ranked = by_f1[by_f1["band"] == band]
        places = sorted({0, len(ranked) // 2, len(ranked) - 1}) if len(ranked) else []
        chosen.append(ranked.iloc[places])
    return pd.concat(chosen)
