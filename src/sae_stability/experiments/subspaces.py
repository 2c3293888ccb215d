"""Do unstable features lie in subspaces that come back, although they do not (C7)?"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from sae_stability import subspaces
from sae_stability.experiments import ensembles, matching, texts
from sae_stability.experiments.codes import encoded
from sae_stability.experiments.columns import interval_columns
from sae_stability.experiments.experiment import Experiment, Results
from sae_stability.files import save_arrays, write_table
from sae_stability.language.activations import Activations, gaussian, whitening
from sae_stability.ledger import MOST, NOWHERE, OTHERWISE, Condition, Rule, judged
from sae_stability.matching import Stability
from sae_stability.sources import SMALLEST_VARIANCE
from sae_stability.statistics import Interval, difference, reach_without
from sae_stability.subspaces import AXES, SEEDS, WRITTEN, Compared, Key, Written

STRONG = 0.05
"""Of the variance: principal axes above it are projected out, to see what is left without them."""
STRONG_OUT, WHITENED = "strong axes out", "whitened"
RANDOM = "random directions"
"""Directions drawn from the activations' covariance that fire as often and as strongly as the unstable features, each alone."""
DRAWN = ("surrogate", "token-conditional", "randomised")
"""Nulls of whose features as many are compared as the model has unstable ones."""
COPIED = ("real", "surrogate")
SHARES = ("overlap", "captured", "ceiling")
"""Quantities that lie between 0 and 1."""
SUPPORTED = "supported in this model if the 95 % intervals over seeds and text lie"
SPACE = "the subspace of rank d/16 of the unstable features of another seed"

C7 = (
    Rule(
        "C7",
        f"share of what the unstable features of a seed write that lies in {SPACE}, as a share of what lies in their own",
        f"{SUPPORTED} above {MOST:g} for the statistic, and above 0 for the effective rank over d of stable decoder rows less that "
        f"of as many unstable ones; {OTHERWISE}",
    ),
    Rule(
        "C7",
        f"share of what the unstable features of a seed write that lies in {SPACE}, as a share of what lies in their own, less the "
        "same of as many features of the surrogate that are most like them in energy and frequency",
        f"{SUPPORTED} above 0 for the statistic, for the same less that of random directions of the activations' covariance with "
        f"equal energies, and for the share in {SPACE} less that along as many principal axes of the activations; {OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C7",
        "how much more of what they write unstable features share with unstable ones, and stable ones with stable ones, than "
        "across (U in U less M in U, less U in M, and M in M); each stable one matches an unstable one in energy and frequency",
        f"{SUPPORTED} above 0 for the statistic, and below 0 for the rank at 90 % of the energy of the unstable ones less that of "
        f"their matches; {OTHERWISE}",
        "beyond energy and frequency",
    ),
)


def compute(results: Results, folder: Path) -> None:
    """Compare what sets of the seeds write, and their decoder rows, in the ensemble and in its nulls."""
    model, held_out = written(results, "real")
    found = first(matching.stability(results), len(model))
    chosen = subspaces.of_bands(found, model)
    covariance = held_out.covariance.double().numpy()
    plain = {WRITTEN: np.eye(len(covariance))}
    whitened = whitening(held_out.covariance, SMALLEST_VARIANCE).double().numpy()
    coordinates = plain | {STRONG_OUT: without_strong(covariance), WHITENED: whitened}
    compared = subspaces.compare(model, chosen, coordinates, covariance, "subspaces, written")
    random = random_directions(dict(zip(ensembles.ensemble(results).seeds, model, strict=False)), held_out)
    alone = subspaces.compare(random, lambda *seed: {"unstable": chosen(*seed)["unstable"]}, plain, covariance, "subspaces, random")
    save_arrays(folder / "real.safetensors", compared.with_set(alone, "unstable", RANDOM).arrays())

    ensemble = ensembles.ensemble(results)
    rows = subspaces.compare_rows(ensemble.W_dec[: len(model)].double().numpy(), found, "subspaces, rows")
    save_arrays(folder / "rows.safetensors", rows.arrays())
    for kind in results.cell.nulls:
        null, on = written(results, kind)
        matched, axes = first(matching.stability(results, kind), len(null)), on.covariance.double().numpy()
        sets = subspaces.of_null(matched, null, model, found) if kind in DRAWN else subspaces.of_bands(matched, null)
        of_null = subspaces.compare(null, sets, plain, axes, f"subspaces, {kind}")
        save_arrays(folder / f"{kind}.safetensors", of_null.arrays())
    tables = []
    for source in COPIED:
        directions = ensembles.ensemble(results, source).W_dec[:SEEDS]
        matched = first(matching.stability(results, source), len(directions))
        everyone = list(range(len(directions)))
        for left_out in [None, *everyone] if len(everyone) > 2 else [None]:
            kept = [seed for seed in everyone if seed != left_out]
            found_without = subspaces.copies(directions, matched, kept)
            tables.append(found_without.assign(kind=source, left_out=-1 if left_out is None else left_out))
    write_table(folder / "copies.parquet", pd.concat(tables, ignore_index=True))


def written(results: Results, kind: str) -> tuple[list[Written], Activations]:
    """What the features of the first seeds write on held-out text, and the activations of that text."""
    contexts, read = texts.contexts(results, "evaluation", kind), encoded(results, kind)
    part = subspaces.parts_of(contexts.cluster[contexts.is_text][: len(read.activations)])
    directions = read.ensemble.W_dec[:SEEDS].numpy()
    return [Written(read.matrix(position), its, part) for position, its in enumerate(directions)], read.activations


def first(found: Stability, seeds: int) -> Stability:
    """What a study of the first seeds alone would have found."""
    return found.among(list(range(seeds)))


def without_strong(covariance: np.ndarray) -> np.ndarray:
    """The projection that takes out every principal axis with more than `STRONG` of the variance."""
    axes, variances = subspaces.strongest_axes(covariance)
    strong = axes[:, variances > STRONG * variances.sum()]
    return np.eye(len(covariance)) - strong @ strong.T


def random_directions(model: Mapping[int, Written], held_out: Activations) -> list[Written]:
    """What random directions of the activations' covariance would write in the place of each seed's features, by the seeds."""
    draw, found = gaussian(held_out.with_moments(0 * held_out.mean, held_out.covariance)), []
    for seed, written_by in model.items():
        drawn = F.normalize(draw(len(written_by.directions), torch.Generator().manual_seed(seed)).double(), dim=1)
        found.append(written_by.alone_in(drawn.numpy()))
    return found


def comparison(results: Results, kind: str = "real") -> Compared:
    """The sets of the ensemble, or of one of its nulls; `rows` are the decoder rows of the ensemble."""
    return _comparison(results.folder("subspaces") / f"{kind}.safetensors")


@lru_cache(maxsize=8)
def _comparison(path: Path) -> Compared:
    return Compared.of(load_file(path))


def captured(of: str, by: str, r: int, coordinates: str = WRITTEN) -> Key:
    """The share of what a set writes that lies in the subspace of a set of another seed."""
    return ("captured", coordinates, of, by, str(r))


def ceiling(of: str, r: int, coordinates: str = WRITTEN) -> Key:
    """The share of it that lies in its own subspace, of other documents."""
    return ("ceiling", coordinates, of, of, str(r))


def of_ceiling(compared: Compared, of: str, r: int, coordinates: str = WRITTEN) -> Interval:
    """What lies in the subspace of the same set of another seed, as a share of what lies in its own."""
    return compared.interval(lambda inside, own: inside / own, captured(of, of, r, coordinates), ceiling(of, r, coordinates))


def contrast(compared: Compared, r: int, coordinates: str = WRITTEN) -> Interval:
    """U in U less M in U, less U in M, and M in M."""
    pairs = (("paired", "paired"), ("matched", "paired"), ("paired", "matched"), ("matched", "matched"))
    return compared.interval(lambda uu, mu, um, mm: uu - mu - um + mm, *(captured(*pair, r, coordinates) for pair in pairs))


def written_table(results: Results) -> pd.DataFrame:
    """One row per kind, coordinates, quantity, sets and rank: what two seeds' sets have in common, with its interval."""
    rows = []
    for kind in results.cell.kinds:
        compared = comparison(results, kind)
        for key in compared.values:
            quantity, *where = key
            value = compared.interval(lambda mean: mean, key)
            value = value.within(0, 1) if quantity in SHARES else value
            rows.append(_row(kind, *key) | interval_columns("value", value))
            if quantity == "ceiling":
                coordinates, of, _, r = where
                share = of_ceiling(compared, of, int(r), coordinates)
                rows.append(_row(kind, "share of ceiling", *where) | interval_columns("value", share))
                if (of, kind) == ("paired", "real"):
                    rows.append(
                        _row(kind, "contrast", coordinates, "", "", r)
                        | interval_columns("value", contrast(compared, int(r), coordinates))
                    )
    where = ["kind", "quantity", "coordinates", "of", "by", "rank"]
    return pd.DataFrame(rows, columns=[*where, "value", "value_low", "value_high"])


def rows_table(results: Results) -> pd.DataFrame:
    """One row per quantity, set and rank: what is found of decoder rows alone."""
    compared, rows = comparison(results, "rows"), []
    for key in compared.values:
        quantity, of, *rest = key
        value = compared.interval(lambda mean: mean, key)
        row = {"quantity": quantity, "of": of, "rank": int(rest[-1]) if rest else 0, **interval_columns("value", value)}
        rows.append(row)
    return pd.DataFrame(rows, columns=["quantity", "of", "rank", "value", "value_low", "value_high"])


def copies_table(results: Results) -> pd.DataFrame:
    """One row per kind, band and group size: cosines of group means, and what noisy copies of a common direction would have.

    The ends of intervals are jackknifed over seeds, and groups are formed again without each.
    """
    found, rows = pd.read_parquet(results.folder("subspaces") / "copies.parquet"), []
    for (kind, band, size), group in found.groupby(["kind", "band", "size"], sort=False):
        by_seed = group.set_index("left_out")
        if -1 not in by_seed.index:
            continue  # a size that only a study of a seed less would take
        row = {"kind": kind, "band": band, "size": size}
        for column, least in (("cosine", -1), ("predicted", -1), ("share", 0)):
            # Without a seed the largest group can be smaller: where it is, there is no interval.
            reach = reach_without(list(by_seed[column].drop(-1))) if len(by_seed) > 2 else np.nan
            value = float(by_seed.loc[-1, column])
            row |= interval_columns(column, Interval(value, value - reach, value + reach).within(least, 1))
        rows.append(row)
    estimates = [f"{column}{end}" for column in ("cosine", "predicted", "share") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["kind", "band", "size", *estimates])


def judge(results: Results) -> list[dict]:
    d_in = ensembles.ensemble(results).W_dec.shape[2]
    return judge_c7(comparison(results), comparison(results, "rows"), comparison(results, "surrogate"), d_in)


def judge_c7(model: Compared, rows: Compared, noise: Compared, d_in: int) -> list[dict]:
    """C7 on one cell, from what the ensemble's sets write, its decoder rows, and what those of the surrogate write.

    The null's value of the first line is that of the surrogate.
    """
    r = subspaces.rule_rank(d_in)
    stated, beyond_noise, beyond_frequency = C7
    share, of_noise = of_ceiling(model, "unstable", r), of_ceiling(noise, "alike", r)
    ranks = (("effective rank over d", of) for of in ("stable", "unstable"))
    lower = rows.interval(lambda stable, unstable: stable - unstable, *ranks)
    over_noise = difference(share, of_noise)
    over_random = model.interval(
        lambda inside, own, random, random_own: inside / own - random / random_own,
        captured("unstable", "unstable", r), ceiling("unstable", r), captured(RANDOM, RANDOM, r), ceiling(RANDOM, r),
    )  # fmt: skip
    along = (captured("unstable", by, r) for by in ("unstable", AXES))
    over_axes = model.interval(lambda inside, axes: inside - axes, *along)
    more_alike = contrast(model, r)
    fewer = model.interval(lambda paired, matched: paired - matched, *(("rank", WRITTEN, of) for of in ("paired", "matched")))
    return [
        judged(
            stated,
            share,
            of_noise,
            [
                Condition("share of what the unstable features' own subspace holds", share, MOST, no_effect=r / d_in),
                Condition("effective rank over d of as many rows, stable less unstable", lower, 0.0),
            ],
        ),
        judged(
            beyond_noise,
            over_noise,
            NOWHERE,
            [
                Condition("less that of as many features of the surrogate", over_noise, 0.0),
                Condition("less that of random directions of equal energy", over_random, 0.0),
                Condition("share in the other seed's subspace less that along principal axes", over_axes, 0.0),
            ],
        ),
        judged(
            beyond_frequency,
            more_alike,
            NOWHERE,
            [
                Condition("contrast of unstable features and their stable matches", more_alike, 0.0),
                Condition("rank at 90 % of the energy, unstable less matched stable", fewer, 0.0, below=True),
            ],
        ),
    ]


def _row(kind: str, quantity: str, *rest: str) -> dict:
    """The columns that say which quantity a row is about; those of sets without coordinates or a rank are empty."""
    if len(rest) == 1:  # features and correlations are of a set, whatever its coordinates
        coordinates, of, by, r = WRITTEN, rest[0], rest[0], "0"
    elif len(rest) == 2:
        coordinates, of, by, r = *rest, rest[1], "0"
    else:
        coordinates, of, by, r = rest
    return {"kind": kind, "quantity": quantity, "coordinates": coordinates, "of": of, "by": by, "rank": int(r)}


EXPERIMENT = Experiment(
    "subspaces",
    compute,
    after=("matching",),
    reads=("threshold", "evaluation_tokens"),
    tables={"subspaces": written_table, "decoder_rows": rows_table, "copies": copies_table},
    claims=judge,
)
