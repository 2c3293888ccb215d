"""Are low-rank features found as a space while they can't be told one by one (C8)? In worlds whose features are known."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, product
from pathlib import Path

import pandas as pd

from sae_stability.experiments.experiment import Experiment, Results, is_main
from sae_stability.files import write_table
from sae_stability.ledger import OTHERWISE, Condition, Rule, judged
from sae_stability.statistics import difference, jackknifed_mean
from sae_stability.synthetic import World, measure_all

FIRST_DRAW = 400
"""Number of the first world on which the rule is judged. Bounds and training were set on worlds below 100; of those from 100 on
there were too few where features have to be told apart, and so there were of those from 200 and from 300 on."""
LONGER = 3
"""Times as many tokens are read where features have to be told apart: to find them takes longer than to find their space."""
LOST, SPANNED, NEAR, TOLD = 0.1, 0.9, 0.1, 0.9
MORE, RARE = "more features than latents", "rare features"
ISOLATED, INVARIANT, TIGHT = "isolated only", "no preferred directions", "sparse, tight budget"
INVARIANT_TIGHT, SLACK = "no preferred directions, tight budget", "sparse, budget to spare"
EQUAL = 0.005
"""Explained variance by which training from the truth and from a random start may differ and count as equal."""
SEEDS = {ISOLATED: 8, INVARIANT: 8, TIGHT: 1, INVARIANT_TIGHT: 1, SLACK: 1}
"""Of each world: several where stability is asked. What is found differs more between worlds than between seeds."""
DIAGRAM_SEEDS = 4
COARSE_SEEDS = 2
MIXED_SEEDS = 8
"""Of each world of the reverse test: the fewer seeds, the fewer latents look unstable for certain."""
POOLED_SEEDS = 8
"""Of each world in which seeds are pooled: two groups of four."""
ACTIVE = (1, 2, 4, 8, None)
BUDGETS = (0.5, 1.0, 2.0)
"""Of the coarse phase diagram; the whole one is published (`diagram`)."""
SUPPORTED = "supported in these worlds if the 95 % intervals over worlds lie"
SCOPE = "in synthetic worlds"

C8 = (
    Rule(
        "C8",
        f"share of the features of blocks without preferred directions (r of 8 and 12) that a latent finds at a cosine of {TOLD:g}",
        f"{SUPPORTED} below {LOST:g} for the statistic, above {SPANNED:g} for the part of the block's space that its latents span, "
        f"and below {NEAR:g} for how far their stability is from that of as many random directions; {OTHERWISE}",
    ),
    Rule(
        "C8",
        "share of the features of sparse blocks of the same sizes, with a tight budget, that a latent finds",
        f"{SUPPORTED} above {TOLD:g} for the statistic, and above 0 for the same less that of blocks without preferred directions "
        f"that have no more budget than they need either; {OTHERWISE}",
        "beyond size and noise",
    ),
    Rule(
        "C8",
        "share of the features of sparse blocks that a latent finds with a tight budget, less that where the budget allows as many "
        "latents as the block has dimensions: features, strengths, frequencies and tokens are the same",
        f"{SUPPORTED} above 0 for the statistic; {OTHERWISE}",
        "beyond energy and frequency",
    ),
)


def judged_worlds(tokens: int) -> dict[str, list[World]]:
    """The worlds on which C8 is judged, by what tells them apart, each a draw of its own."""
    sizes, draws = (8, 12), count(FIRST_DRAW)
    base, longer = World(tokens=tokens), World(tokens=LONGER * tokens)
    sparse = [replace(longer, r=r, active=active, seed=next(draws)) for r in sizes for active in (1, 2) for _ in range(6)]
    return {
        ISOLATED: [replace(base, blocks=0, zipf=zipf, seed=next(draws)) for zipf in (0.0, 1.0)],
        INVARIANT: [replace(base, r=r, seed=next(draws)) for r in sizes for _ in range(2)],
        TIGHT: sparse,
        INVARIANT_TIGHT: [replace(longer, r=r, budget=0.5, seed=next(draws)) for r in sizes for _ in range(3)],
        SLACK: [replace(world, budget=(world.isolated_active + world.r) / world.l0) for world in sparse if world.active == 1][::2],
    }


def coarse_diagram(tokens: int) -> list[World]:
    """Features active at a time against the budget, at r = 8 and m = 16."""
    return [World(active=active, budget=budget, tokens=tokens) for active in ACTIVE for budget in BUDGETS]


def phase_diagram() -> dict[str, list[World]]:
    """The published one: slices through the parameters of a world, by their names."""
    laws, budgets = (1, 2, 4, None), (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    often, tokens = (1e-4, 1e-3, 1e-2), (50_000, 150_000, 500_000, 1_500_000)

    def crossed(**choices: Sequence) -> list[World]:
        return [World(**dict(zip(choices, choice, strict=True))) for choice in product(*choices.values())]

    return {
        "active and budget": crossed(active=(1, 2, 3, 4, 6, 8, None), budget=budgets, seed=(0, 1)),
        "dimensions and features": crossed(r=(2, 3, 4, 6, 8, 10, 12, 16), features_over_r=(1.25, 1.5, 2.0, 3.0), active=(1, None)),
        "width and budget": crossed(active=(2, None), width=(0.5, 0.75, 1.0, 1.5, 2.0), budget=(0.5, 1.0, 1.5, 2.0)),
        "frequency and tokens": crossed(active=(1,), zipf=(0.0, 1.0, 2.0), rare=(8,), rare_frequency=often, tokens=tokens),
        "noise": crossed(active=laws, noise=(0.1, 0.25, 0.5, 1.0, 2.0)),
        "crowded": crossed(active=laws, crowded=(False, True), seed=(0, 1)),
        "together": crossed(active=laws, together=(0.0, 0.25, 0.5), seed=(0, 1)),
        "hierarchy": crossed(active=laws, hierarchy=(False, True), seed=(0, 1)),
        "from the truth": crossed(r=(8, 12), active=(1, None), from_truth=(False, True), tokens=(1_500_000,), seed=(0, 1)),
    }


def mixed_worlds() -> list[World]:
    """Worlds in which latents are unstable for two reasons: blocks whose axes turn, and more features of their own than an SAE has
    latents for, most of them rare, of which each seed finds some."""
    crossed = product((12, 16), (0.5, 1.0), (0.5, 1.0))
    return [
        World(r=r, isolated=200, isolated_active=3, zipf=zipf, noise=noise, width=0.5, seed=seed)
        for seed, (r, zipf, noise) in enumerate(crossed)
    ]


def pooled_worlds() -> dict[str, list[World]]:
    """Worlds in which seeds are pooled: where each seed finds some of the features only, and where blocks can't be told or can."""
    many, longer = World(blocks=0, isolated=200, isolated_active=3, width=0.5), World(tokens=1_500_000)
    return {
        MORE: [
            replace(many, zipf=zipf, noise=noise, seed=seed) for seed, (zipf, noise) in enumerate(product((0.5, 1.0), (0.5, 1.0)))
        ],
        RARE: [World(blocks=0, rare=24, width=1.0, seed=seed) for seed in range(4)],
        INVARIANT: [World(r=r, seed=seed) for seed, r in enumerate((8, 8, 12, 12))],
        TIGHT: [replace(longer, r=r, active=active, seed=seed) for seed, (r, active) in enumerate(product((8, 12), (1, 2)))],
    }


def compute(results: Results, folder: Path) -> None:
    """Train SAEs on the worlds of the rule, and on those of a coarse phase diagram."""
    tokens = results.study.world_tokens
    found = [measure_all(worlds, SEEDS[kind], kind).assign(kind=kind) for kind, worlds in judged_worlds(tokens).items()]
    write_table(folder / "judged.parquet", pd.concat(found, ignore_index=True))
    write_table(folder / "diagram.parquet", measure_all(coarse_diagram(tokens), COARSE_SEEDS, "phase diagram"))


def worlds_table(results: Results) -> pd.DataFrame:
    """One row a world on which C8 is judged: its parameters, and what was found (`synthetic.Recovery`)."""
    return pd.read_parquet(results.folder("synthetic") / "judged.parquet")


def diagram_table(results: Results) -> pd.DataFrame:
    """The same of the worlds of the coarse phase diagram."""
    return pd.read_parquet(results.folder("synthetic") / "diagram.parquet")


def judge(results: Results) -> list[dict]:
    return judge_c8(worlds_table(results))


def judge_c8(worlds: pd.DataFrame) -> list[dict]:
    """C8, from its worlds, each a draw of its own. The null's value of the first two lines is that of the other kind of block."""
    by_kind = {kind: worlds[worlds["kind"] == kind] for kind in (INVARIANT, TIGHT, INVARIANT_TIGHT, SLACK)}
    lost, told, not_told = (jackknifed_mean(by_kind[kind]["found_in_blocks"]) for kind in (INVARIANT, TIGHT, INVARIANT_TIGHT))
    spanned = jackknifed_mean(by_kind[INVARIANT]["subspace"])
    off = jackknifed_mean((by_kind[INVARIANT]["p_in_blocks"] - by_kind[INVARIANT]["expected_p"]).abs())
    slack = by_kind[SLACK].set_index("seed")["found_in_blocks"]
    same = by_kind[TIGHT].set_index("seed")["found_in_blocks"].loc[slack.index]  # the same draws with a tight budget
    stated, beyond_noise, beyond_frequency = C8
    lines = [
        judged(
            stated,
            lost,
            told,
            [
                Condition("features of blocks without preferred directions that are found", lost, LOST, below=True, no_effect=TOLD),
                Condition("part of the block's space that its latents span", spanned, SPANNED, no_effect=0.0),
                Condition("stability of a block's latents, off that of random directions", off, NEAR, below=True, no_effect=1.0),
            ],
        ),
        judged(
            beyond_noise,
            told,
            not_told,
            [
                Condition("features of sparse blocks that are found with a tight budget", told, TOLD, no_effect=LOST),
                Condition("less those of blocks without preferred directions", difference(told, not_told), 0.0),
            ],
        ),
        judged(
            beyond_frequency,
            jackknifed_mean(same - slack),
            jackknifed_mean(slack),
            [Condition("features found with a tight budget, less those with one to spare", jackknifed_mean(same - slack), 0.0)],
        ),
    ]
    return [line | {"scope": SCOPE} for line in lines]


EXPERIMENT = Experiment(
    "synthetic",
    compute,
    reads=("world_tokens",),
    tables={"worlds": worlds_table, "diagram": diagram_table},
    claims=judge,
    asked=is_main,
    trains="topk",
)
