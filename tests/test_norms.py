"""Norms and principal axes against NumPy, on activations with planted outliers."""

import numpy as np
import pytest
import torch

from sae_stability.errors import UserError
from sae_stability.language.norms import AXES, QUANTILES, describe

CONTEXTS, LENGTH, D_IN = 40, 25, 12
PLANTED = [3, 257, 999]


@pytest.fixture(scope="module")
def planted():
    """Activations of whole contexts whose first token is fifty times as long as the others, and three tokens twenty times."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(CONTEXTS * LENGTH, D_IN)) * np.arange(1, D_IN + 1)
    position = np.tile(np.arange(LENGTH), CONTEXTS)
    usual = np.median(np.linalg.norm(x, axis=1))
    x[position == 0] = 50 * usual * np.eye(D_IN)[0]
    x[PLANTED] = 20 * usual * np.eye(D_IN)[1]
    return x.astype(np.float32), position, rng.integers(0, 90, len(x))


def test_norms_are_numpys_overall_and_by_position(planted):
    x, position, token = planted
    found = describe(torch.from_numpy(x), position, token, cutoff=10)
    lengths = np.linalg.norm(x.astype(np.float64), axis=1)
    assert found.median == pytest.approx(np.median(lengths), rel=1e-6)
    assert found.quantiles.position.tolist() == [-1, *range(LENGTH)]
    for row in found.quantiles.itertuples(index=False):
        part = lengths if row.position == -1 else lengths[position == row.position]
        assert row.tokens == len(part)
        np.testing.assert_allclose(row[2:], np.quantile(part, QUANTILES) / np.median(lengths), rtol=1e-5)


def test_outliers_are_those_that_were_planted(planted):
    x, position, token = planted
    found = describe(torch.from_numpy(x), position, token, cutoff=10)
    assert found.outlier_share == (CONTEXTS + len(PLANTED)) / len(x)
    assert found.outliers.row.tolist() == [*np.flatnonzero(position == 0), *PLANTED]  # longest first, then as read
    assert found.outliers.token.tolist() == token[found.outliers.row].tolist()
    assert found.outliers.position.tolist() == position[found.outliers.row].tolist()
    np.testing.assert_allclose(found.outliers.norm, np.repeat([50, 20], [CONTEXTS, 3]), rtol=0.05)
    assert len(describe(torch.from_numpy(x), position, token, cutoff=30).outliers) == CONTEXTS


def test_principal_axes_are_numpys_with_and_without_outliers(planted):
    x, position, token = planted
    found = describe(torch.from_numpy(x), position, token, cutoff=10)
    few = np.delete(x, [*np.flatnonzero(position == 0), *PLANTED], axis=0)
    for shares, part in ((found.variance, x), (found.variance_without, few)):
        singular = np.linalg.svd(part.astype(np.float64) - part.astype(np.float64).mean(0), compute_uv=False) ** 2
        np.testing.assert_allclose(shares, (singular / singular.sum())[:AXES], rtol=1e-4)
    assert found.variance[0] > 0.9
    assert found.variance_without[0] < 0.3


def test_bfloat16_activations_are_described_as_float32_ones(planted):
    x, position, token = planted
    half, full = (describe(torch.from_numpy(x).to(dtype), position, token, cutoff=10) for dtype in (torch.bfloat16, torch.float32))
    assert half.median == pytest.approx(full.median, rel=0.01)
    np.testing.assert_allclose(half.variance, full.variance, atol=0.01)


@pytest.mark.parametrize("cutoff", [0.5, 0, float("nan")])
def test_a_cutoff_that_leaves_out_usual_tokens_is_one_line(planted, cutoff):
    x, position, token = planted
    with pytest.raises(UserError, match=r"^cutoff: .*give 1 or more$"):
        describe(torch.from_numpy(x), position, token, cutoff=cutoff)
