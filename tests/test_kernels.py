"""The compiled kernels against the plain ones and against dense tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_stability.saes import compiled, plain, sparse
from sae_stability.saes.sparse import Codes, Parameters
from sae_stability.threads import each_seed

shapes = st.tuples(st.integers(1, 20), st.integers(2, 700), st.integers(1, 40), st.integers(0, 10_000))
BOTH = pytest.mark.parametrize("kernels", [plain, compiled])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(rows: int, d_sae: int, seed: int) -> tuple[Codes, torch.Tensor]:
    """Codes of which about a fifth fire, and the same as a dense matrix."""
    dense = normal(rows, d_sae, seed=seed) * (torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(seed + 1)) < 0.2)
    fires = dense != 0
    starts = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0))
    return Codes(starts, fires.nonzero()[:, 1], dense[fires]), dense


def check_top(kernels, rows: int, d_sae: int, k: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """The k largest are all there, and no feature twice."""
    k = min(k, d_sae)
    pre = normal(rows, d_sae, seed=seed).to(dtype)  # bfloat16 has many ties
    features = kernels.top(pre.to(device), k).cpu()
    assert all(len(set(row)) == k for row in features.tolist())
    ours, best = pre.gather(1, features).float(), torch.topk(pre.float(), k, dim=1).values
    torch.testing.assert_close(ours.relu().sort(1, descending=True).values, best.relu(), rtol=0, atol=0)


@DTYPES
@given(shape=shapes)
@settings(max_examples=60)
def test_top_finds_the_k_largest(shape, dtype):
    check_top(compiled, *shape, dtype)


def test_top_fills_up_where_too_few_are_positive():
    pre = -torch.ones(3, 600)
    pre[1, 7] = 2.0
    features = compiled.top(pre, 4)
    assert all(len(set(row)) == 4 for row in features.tolist())
    assert 7 in features[1]


def test_more_features_than_there_are_can_not_be_the_largest():
    for k in (-1, 9):
        with pytest.raises(ValueError, match=f"k: {k} of 8 features"):
            compiled.top(torch.ones(3, 8), k)
    sae = Parameters(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8))
    with pytest.raises(ValueError, match="k: 9"):
        sparse.top(sae, torch.ones(3, 8), 9, torch.float32)
    assert compiled.top(torch.ones(3, 8), 8).sort().values.tolist() == [list(range(8))] * 3


W, ROWS, VALUES = torch.ones(5, 4), torch.ones(2, 4), torch.ones(3)
FITTING = torch.tensor([0, 1, 3]), torch.tensor([0, 4, 2])


@pytest.mark.parametrize(
    ("starts", "features"),
    [
        ([0, 1, 3], [0, 5, 2]),  # no such feature
        ([0, 1, 3], [0, -1, 2]),
        ([0, 1, 4], [0, 4, 2]),  # more firings than there are
        ([0, 1, 2], [0, 4, 2]),
        ([1, 2, 3], [0, 4, 2]),
        ([0, 9, 3], [0, 4, 2]),  # rows that overlap
        ([0, -9, 3], [0, 4, 2]),
        ([0, 1, 2, 3], [0, 4, 2]),  # another count of rows
        ([0, 3], [0, 4, 2]),
    ],
)
def test_firings_that_leave_their_matrix_are_refused_before_a_kernel_reads_them(starts, features):
    given = torch.tensor(starts), torch.tensor(features)
    refused = pytest.raises(ValueError, match="firings: 3 firings in")
    with refused:
        compiled.dots(ROWS, W, *given)
    with refused:
        compiled.sums(plain.ByFeature(given[0], given[1], torch.arange(3)), VALUES, W, torch.empty(2, 4))
    if len(starts) == 3:
        with refused:
            compiled.combine(VALUES, W, *given)
        with refused:
            compiled.transposed(*given, 5)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: compiled.above(torch.ones(3, 8), torch.zeros(1)), "bound"),
        (lambda: compiled.above(torch.ones(3, 8), torch.zeros(9)), "bound"),
        (lambda: compiled.dots(torch.ones(2, 3), W, *FITTING), "rows"),
        (lambda: compiled.combine(torch.ones(2), W, *FITTING), "values"),
        (lambda: compiled.sums(compiled.transposed(*FITTING, 5), VALUES, ROWS, torch.empty(5, 3)), "rows"),
        (lambda: compiled.sums(compiled.transposed(*FITTING, 5), VALUES, ROWS, torch.empty(4, 4)), "firings"),
        (lambda: compiled.sums(compiled.transposed(*FITTING, 5)._replace(order=torch.arange(2)), VALUES, ROWS, W), "order"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(call, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        call()


def test_in_bfloat16_what_lies_just_above_its_bound_is_not_missed():
    x = torch.tensor([[1.001], [0.5]])  # in bfloat16 the first is 1, as is the bound
    sae = Parameters(torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1), torch.zeros(1))
    codes = sparse.above(sae, x, torch.ones(1), torch.bfloat16)
    torch.testing.assert_close(codes.values, torch.tensor([1.001]))


@DTYPES
@given(shape=shapes)
@settings(max_examples=40)
def test_above_finds_what_exceeds_each_features_bound(shape, dtype):
    rows, d_sae, _, seed = shape
    pre, bound = normal(rows, d_sae, seed=seed).to(dtype), normal(d_sae, seed=seed + 1).relu()
    for ours, theirs in zip(compiled.above(pre, bound), plain.above(pre, bound), strict=True):
        assert torch.equal(ours, theirs)
    starts, features = plain.above(pre, bound)
    fires = torch.zeros(rows, d_sae, dtype=torch.bool)
    fires[torch.arange(rows).repeat_interleave(starts.diff()), features] = True
    assert torch.equal(fires, pre > bound.to(dtype))


def check_products(kernels, rows: int, d_sae: int, d_in: int, seed: int, device: str = "cpu") -> None:
    """Sparse products are dense ones, and firings are sorted as by the reference."""
    codes, dense = random_codes(rows, d_sae, seed)
    W, x = normal(d_sae, d_in, seed=seed + 2), normal(rows, d_in, seed=seed + 3)
    starts, features, values = (tensor.to(device) for tensor in codes)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kernels.combine(values, W.to(device), starts, features).cpu(), dense @ W, **close)
    torch.testing.assert_close(kernels.dots(x.to(device), W.to(device), starts, features).cpu(), (x @ W.T)[dense != 0], **close)
    firings, out = kernels.transposed(starts, features, d_sae), torch.full((d_sae, d_in), 7.0, device=device)
    kernels.sums(firings, values, x.to(device), out)
    torch.testing.assert_close(out.cpu(), dense.T @ x, **close)
    torch.testing.assert_close(kernels.totals(firings, values).cpu(), dense.sum(0), **close)
    for ours, theirs in zip(firings, plain.transposed(codes.starts, codes.features, d_sae), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@BOTH
@given(shape=shapes)
@settings(max_examples=40)
def test_sparse_products_are_dense_products(shape, kernels):
    check_products(kernels, *shape)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    codes, _ = random_codes(300, 900, 0)
    W, x = normal(900, 64, seed=1), normal(300, 64, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 3 - threads):
            torch.set_num_threads(count)
            out = torch.empty(900, 64)
            compiled.sums(codes.by_feature(900), codes.values, x, out)
            results.append([out, codes.decode(W), codes.into(x, W), compiled.top(x @ W.T, 9)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@DTYPES
@given(rows=st.integers(1, 90), d_sae=st.integers(4, 200), k=st.integers(1, 4), seed=st.integers(0, 1000), skewed=st.booleans())
@settings(max_examples=40)
def test_top_of_batch_finds_the_largest_of_the_batch(rows, d_sae, k, seed, skewed, dtype):
    d_in = 8
    x = normal(rows, d_in, seed=seed)
    if skewed:  # few tokens hold most of the largest: the sample of tokens says little about the batch
        x[:: max(2, rows // 3)] *= 50
    W = normal(d_sae, d_in, seed=seed + 1)
    sae = Parameters(W, normal(d_sae, seed=seed + 2), W, torch.zeros(d_in))
    codes = sparse.top_of_batch(sae, x, k, dtype)
    pre = x @ sae.W_enc_rows.T + sae.b_enc
    positive = int((pre > 0).sum())
    assert len(codes.values) == min(rows * k, positive) or dtype == torch.bfloat16  # whose zero lies a rounding away
    if dtype == torch.float32:
        found, best = codes.values.sort(descending=True).values, pre.flatten().relu().topk(len(codes.values)).values
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)
    row = codes.rows()
    assert torch.all((row * d_sae + codes.features).diff() > 0)  # features rise within a token
    torch.testing.assert_close(codes.values, pre[row, codes.features], rtol=1e-4, atol=1e-4)


def test_keeping_some_firings_is_zeroing_the_others():
    codes, dense = random_codes(30, 40, 3)
    chosen = torch.rand(len(codes.values)) < 0.5
    zeroed = codes._replace(values=codes.values * chosen)
    assert torch.equal(codes.keep(chosen).dense(40), zeroed.dense(40))
    assert torch.equal(codes.dense(40), dense)
    assert np.array_equal(codes.fired(), codes.features[codes.values > 0])


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_share_the_threads_and_come_back_in_order(seeds):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        given = each_seed(lambda seed: (seed, torch.get_num_threads()), seeds, "seeds")
        assert [seed for seed, _ in given] == list(range(seeds))
        assert {threads for _, threads in given} == {2 if seeds == 1 else 1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def check_pursuit(kernels, rows: int, d_sae: int, k: int, seed: int, device: str = "cpu") -> None:
    """What is taken is what the plain kernel takes; where two directions lie alike, either may be."""
    directions = torch.nn.functional.normalize(normal(d_sae, 24, seed=seed), dim=1)
    x, gram = normal(rows, 24, seed=seed + 1), directions @ directions.T
    expected = plain.pursue(x @ directions.T, gram, k)
    features, values = (found.cpu() for found in kernels.pursue((x @ directions.T).to(device), gram.to(device), k))
    assert features.shape == values.shape == (rows, k)
    torch.testing.assert_close(values, expected[1], atol=1e-4, rtol=1e-4)
    same = (features == expected[0]) | (values < 1e-3)
    assert same.double().mean() > 0.98


@given(shape=shapes)
@settings(max_examples=60)
def test_pursuit_takes_what_the_plain_kernel_takes(shape):
    check_pursuit(compiled, *shape)


def test_cosines_must_be_those_of_the_directions():
    with pytest.raises(ValueError, match=r"gram: \[3, 3\] does not fit 4 directions"):
        compiled.pursue(torch.ones(2, 4), torch.eye(3), 1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_unit_step_is_adam_on_the_sphere(scale):
    W = torch.nn.functional.normalize(normal(300, 70, seed=0), dim=1)
    ours, theirs = W.clone(), torch.nn.Parameter(W.clone())
    moments, adam = (torch.zeros_like(W), torch.zeros_like(W)), torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.99), eps=1e-7)
    for step in range(1, 20):
        its = scale * normal(300, 70, seed=step)
        compiled.unit_step(ours, its, moments, 0.01, step, (0.8, 0.99), 1e-7)
        theirs.grad = its - (its * theirs.detach()).sum(1, keepdim=True) * theirs.detach()
        adam.step()
        with torch.no_grad():
            theirs.copy_(torch.nn.functional.normalize(theirs, dim=1))
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(300))
    with pytest.raises(ValueError, match="moments"):
        compiled.unit_step(ours, its, (moments[0], moments[1][:-1]), 0.01, 1, (0.9, 0.999), 1e-8)
