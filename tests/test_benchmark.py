import math

import pandas as pd
import pytest

from sae_stability.book import benchmark


def times(**by_contestant: float) -> pd.DataFrame:
    return pd.DataFrame({"variant": "relu", "contestant": list(by_contestant), "ms": list(by_contestant.values())})


OURS = {"ours, 8 seeds": 10.0, "ours, 4 seeds": 11.0, "ours, 1 seed": 15.0}


def test_a_peer_stands_for_its_fastest_mode_and_has_no_time_where_it_does_not_train():
    (row,) = benchmark.by_variant(times(**OURS, **{"saelens, float32": 90.0, "saelens, bfloat16": 80.0})).to_dict("records")
    assert row["ours, 8 seeds"] == 10
    assert row["saelens"] == 80
    assert math.isnan(row["sparsify"])


def test_parts_of_the_floor_are_no_contestants():
    measured = times(**OURS, adam=1.0, **{"product float32": 5.0, "saelens, float32": 90.0})
    assert list(benchmark.step_times(measured, "relu")["ms"]) == [10, 11, 15, 90]
    assert benchmark.step_times(measured, "topk").empty


def quality(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["variant", "contestant", "l0", "explained_variance"])


def test_gaps_compare_what_has_the_same_l0():
    measured = quality(
        ("topk", "ours, float32", 16.0, 0.9),
        ("topk", "ours, fastest", 16.0, 0.81),
        ("topk", "saelens", 16.0, 0.80),
        ("jumprelu", "ours, fastest", 16.0, 0.7),
        ("jumprelu", "saelens", 32.0, 0.85),
        ("jumprelu", "ours, fastest, L0 32", 32.5, 0.83),
        ("relu", "ours, fastest", 16.0, 0.7),
        ("relu", "saelens", 17.5, 0.7),
    )
    gaps = benchmark.gaps(measured)
    assert gaps["topk"] == pytest.approx(0.01)
    assert gaps["jumprelu"] == pytest.approx(-0.02)
    assert math.isnan(gaps["relu"])


def test_bfloat16_moves_quality_up_or_down():
    rows = [{"variant": "relu", "float32": 0.7, "bfloat16": 0.69}, {"variant": "topk", "float32": 0.7, "bfloat16": 0.7}]
    moved = benchmark.moved_by_bfloat16({"bfloat16": {"quality": rows}})
    assert (moved.idxmax(), moved.max()) == ("relu", pytest.approx(0.01))


def test_peers_are_named_with_what_was_installed():
    bench = {
        "versions": {"sae-lens": "6", "dictionary-learning": "0.1", "eai-sparsify": "1"},
        "ratios": dict.fromkeys(benchmark.PEERS, 4),
    }
    first = benchmark.peers(bench).iloc[0]
    assert (first["name"], first["version"], first["times_ours"]) == ("SAELens", "6", 4)


def test_the_last_of_ours_at_the_same_l0_counts():
    measured = quality(
        ("topk", "saelens", 16.0, 0.80), ("topk", "ours, fastest", 16.5, 0.81), ("topk", "ours, fastest, L0 16", 16.0, 0.805)
    )
    assert benchmark.gaps(measured)["topk"] == pytest.approx(0.005)
