import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import chisquare

from helpers import drawn
from sae_stability.errors import UserError
from sae_stability.files import TEMPORARY, read_json
from sae_stability.language.activations import Activations
from sae_stability.matching import stability
from sae_stability.saes import variant
from sae_stability.saes.sparse import Parameters
from sae_stability.saes.topk import TopK
from sae_stability.study import Cell, Variants
from sae_stability.training import descent, loop, steering, train, train_all
from sae_stability.training.loop import schedule
from sae_stability.training.shards import Job, _groups
from sae_stability.training.shuffling import ROUNDS, shuffled
from sae_stability.training.steering import l0

every_variant = pytest.mark.parametrize("name", Variants.__args__)


def sparse_data(tokens: int = 2048, d_in: int = 12, features: int = 16, seed: int = 0) -> torch.Tensor:
    """Sums of a few known directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    fires = torch.rand(tokens, features, generator=generator) < 0.12
    return (fires * (1 + torch.rand(tokens, features, generator=generator))) @ directions


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


@pytest.fixture
def fixed(cell):
    """The cell of any variant, its penalty given: nothing to steer."""
    return lambda name, **keys: cell.model_copy(update={"variant": name, "coefficient": 1.0, **keys})


@every_variant
def test_a_seed_alone_is_the_same_seed_in_company(fixed, name):
    x, cell = sparse_data(), fixed(name, clip=1.0)
    together, reordered = train(cell, x, [0, 1, 2]), train(cell, x, [2, 0])
    assert same(together.of(1), train(cell, x, [1]))
    assert same(together.of(2), reordered.of(0))
    assert same(together.of(0), reordered.of(1))
    assert not same(together.of(0), together.of(1))


@every_variant
def test_threads_and_shards_change_no_bit(fixed, name, tmp_path):
    x, cell = sparse_data(), fixed(name, clip=1.0, encoder="float32")
    whole = train(cell, x, [0, 1, 2], tmp_path / "whole")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same(whole, train(cell, x, [0, 1, 2], tmp_path / "single"))
    finally:
        torch.set_num_threads(threads)
    assert same(whole, train(cell, x, [0, 1, 2], tmp_path / "shards", at_once=2))
    for other in ("single", "shards"):
        assert contents(tmp_path / other) == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=50)
def test_shards_hold_each_seed_once_and_never_too_many(counts, at_once):
    cell = Cell(model="none", hook_name="blocks.0.hook_resid_post", tokens=64, d_sae=8, k=2, seeds=3, batch=64)
    x = Activations.of(torch.randn(64, 4))
    jobs = [Job(cell, x, list(range(count)), None, [0.0] * count) for count in counts]
    groups = _groups(jobs, (), torch.device("cpu"), at_once)
    assert all(sum(map(len, group.values())) <= at_once for group in groups)
    for index, count in enumerate(counts):
        assert [position for group in groups for position in group.get(index, [])] == list(range(count))


def test_initialisation_and_order_can_each_be_held_fixed(cell):
    x = sparse_data()
    pinned = cell.model_copy(update={"fixed_initialisation": True, "fixed_order": True})
    both = train(pinned, x, [4, 5])
    assert same(both.of(0), both.of(1))
    for free in ("fixed_initialisation", "fixed_order"):
        ensemble = train(pinned.model_copy(update={free: False}), x, [4, 5])
        assert not same(ensemble.of(0), ensemble.of(1))


@every_variant
@pytest.mark.parametrize("stop_at", [3, 20])
def test_an_interrupted_run_resumes_to_the_same_bits(fixed, name, tmp_path, monkeypatch, stop_at):
    x, cell = sparse_data(), fixed(name)
    monkeypatch.setattr(loop, "STRETCH", 1)
    undisturbed = train(cell, x, [0, 1, 2], tmp_path / "a", at_once=2, checkpoint_seconds=0)
    step = loop.Training._step

    def dies(self, trainee, gradient, most_dead, x, at):
        if trainee.seed == 1 and at == stop_at:
            raise KeyboardInterrupt
        return step(self, trainee, gradient, most_dead, x, at)

    monkeypatch.setattr(loop.Training, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(cell, x, [0, 1, 2], tmp_path / "b", at_once=2, checkpoint_seconds=0)
    monkeypatch.setattr(loop.Training, "_step", step)
    assert same(undisturbed, train(cell, x, [0, 1, 2], tmp_path / "b", at_once=2, checkpoint_seconds=0))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_odd_seed_is_shared_among_the_workers(cell, monkeypatch):
    both_at_work, begun = threading.Barrier(2, timeout=20), []
    advance = loop.Training._advance

    def in_company(self, trainee, most_dead, steps, **of):
        begun.append((trainee.seed, steps.start))
        both_at_work.wait()  # which breaks where a worker has nothing to do
        return advance(self, trainee, most_dead, steps, **of)

    monkeypatch.setattr(loop.threads, "workers", lambda seeds: 2)
    monkeypatch.setattr(loop.Training, "_advance", in_company)
    monkeypatch.setattr(loop, "STRETCH", 2)
    steps = range(8)
    monkeypatch.setattr(loop, "CURVE_POINTS", 2)  # after four steps, and after eight
    monkeypatch.setattr(loop, "SNAPSHOT_SHARES", ())
    x = sparse_data(len(steps) * cell.batch)
    train(cell.model_copy(update={"tokens": len(x)}), x, [3, 4, 5])
    for seed in (3, 4, 5):
        assert [start for of, start in begun if of == seed] == list(steps[::2])


def test_checkpoints_that_take_long_are_made_rarely(cell, tmp_path, monkeypatch):
    now, saved = [0.0], []

    def save(path, tensors, metadata):
        if path.name == loop.CHECKPOINT:
            saved.append(now[0])
            now[0] += 5

    mark = loop.Training._mark

    def a_second_later(self):
        now[0] += 1
        mark(self)

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "save_tensors", save)
    monkeypatch.setattr(loop.Training, "_mark", a_second_later)
    monkeypatch.setattr(loop, "STRETCH", 1)
    monkeypatch.setattr(loop, "TURNS", 1)
    short = cell.model_copy(update={"tokens": 600 * 4, "batch": 4})
    train(short, sparse_data(600 * 4), [0, 1], tmp_path, checkpoint_seconds=20)
    assert saved == [21, 277, 533]  # after 20 seconds, then after the 250 of which 5 are two in a hundred


def test_known_directions_come_back_and_gaussian_noise_does_not(cell):
    longer = cell.model_copy(update={"tokens": 20_000, "passes": 5, "d_sae": 24, "k": 3, "rate": 1e-2})
    x = sparse_data(20_000, d_in=32, features=24)
    real = stability(train(longer, x, [0, 1, 2]).W_dec, 0.9).mean().value
    spread = torch.linalg.cholesky(torch.cov(x.T) + 1e-4 * torch.eye(32))
    noise = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1)) @ spread.T
    null = stability(train(longer, noise, [0, 1, 2]).W_dec, 0.9).mean().value
    assert real > 0.8
    assert null < 0.2


def test_the_decoder_keeps_unit_rows_and_dead_features_are_revived(cell, monkeypatch):
    begin = TopK.initialise

    def handicapped(self, d_in, d_sae, generator):
        sae = begin(self, d_in, d_sae, generator)
        sae.b_enc[d_sae // 2 :] = -2.5  # half of the features lose every contest
        return sae

    monkeypatch.setattr(TopK, "initialise", handicapped)
    x = sparse_data(8192, features=32)
    wide = cell.model_copy(update={"tokens": 8192, "passes": 4, "d_sae": 32, "k": 3, "dead_after": 512})
    revived, left_alone = (train(wide.model_copy(update={"dead_after": after}), x, [0]) for after in (512, 10**9))
    torch.testing.assert_close(revived.W_dec.norm(dim=2), torch.ones(1, 32))
    fires = [int((ensemble.encode(x)[0, :, 16:] > 0).any(0).sum()) for ensemble in (revived, left_alone)]
    assert fires[0] > fires[1]


def test_the_rate_rises_stays_and_falls():
    rates = [schedule(step / 1000, 0.1, 0.2) for step in range(1000)]
    assert rates[0] < 0.02
    assert rates[100:800] == [1.0] * 700
    assert rates[-1] == pytest.approx(0.005)
    assert np.all(np.diff(rates[800:]) < 0)


def test_a_seed_that_diverges_stops_and_the_others_go_on(cell, tmp_path, monkeypatch, capsys):
    x = sparse_data()
    undisturbed = train(cell, x, [0, 1, 2])
    gradients = TopK.gradients

    def explodes(self, sae, gradient, x):
        error, codes = gradients(self, sae, gradient, x)
        return (error * math.nan if sae.b_dec.data_ptr() == marked[0] else error), codes

    marked = [None]
    begin = loop.Training._trainee

    def marks(self, position, seed, method):
        trainee = begin(self, position, seed, method)
        if seed == 1:
            marked[0] = trainee.sae.b_dec.data_ptr()
        return trainee

    monkeypatch.setattr(TopK, "gradients", explodes)
    monkeypatch.setattr(loop.Training, "_trainee", marks)
    rest = train(cell, x, [0, 1, 2], tmp_path)
    assert rest.seeds == [0, 2]
    assert same(rest.of(0), undisturbed.of(0))
    assert same(rest.of(1), undisturbed.of(2))
    assert read_json(tmp_path / "diverged.json") == {"1": 0}
    assert "seed 1 diverged at step 0" in "".join(capsys.readouterr())


def test_where_every_seed_diverges_the_rate_is_named(cell):
    with pytest.raises(UserError, match="rate: every seed"):
        train(cell.model_copy(update={"rate": 1e8}), sparse_data(), [0])


def test_clipping_bounds_the_gradient_of_one_seed():
    gradient = Parameters(torch.full((3, 2), 2.0), torch.full((3,), 2.0), torch.full((3, 2), 2.0), torch.full((2,), 2.0))
    descent._clip(gradient, 1.0)
    assert torch.cat([part.flatten() for part in gradient]).norm() == pytest.approx(1.0)
    descent._clip(gradient, 5.0)
    assert torch.cat([part.flatten() for part in gradient]).norm() == pytest.approx(1.0)


def test_too_few_activations_are_said(cell):
    with pytest.raises(UserError, match="tokens"):
        train(cell, sparse_data(100), [0])


@pytest.mark.parametrize(("name", "batch"), [("relu", 256), ("gated", 256), ("jumprelu", 128)])  # thresholds need many steps
def test_a_penalty_is_steered_to_the_wanted_l0(cell, name, batch, tmp_path):
    x = Activations.of(sparse_data(20_000, d_in=32, features=24))
    size = {"tokens": 20_000, "passes": 5, "batch": batch, "d_sae": 48, "k": 3, "rate": 1e-2}
    wanted = cell.model_copy(update={"variant": name, **size})
    ensemble = train(wanted, x, [0, 1, 2, 3], tmp_path)
    # The ensemble's, as in the tables: seeds differ at one coefficient.
    assert np.mean([l0(ensemble, position, x) for position in range(4)]) == pytest.approx(3, rel=0.1)
    assert ensemble.coefficient > 0
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_seed_alone_has_the_bits_of_one_in_company_on_many_threads_too(cell):
    """Alone it has all threads, in company one each; how many features are revived is any number."""
    x = drawn(6000, 4) @ drawn(4, 64, seed=1) + 0.1 * drawn(6000, 64, seed=2)
    changed = {"d_sae": 160, "k": 2, "tokens": 6000, "passes": 2, "batch": 256, "encoder": "float32", "dead_after": 1500}
    recipe, threads = cell.recipe.model_copy(update=changed), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        alone = train(recipe, Activations.of(x), [0])
        torch.set_num_threads(4)
        beside = train(recipe, Activations.of(x), [0, 1, 2, 3])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(alone.parameters, beside.parameters, strict=True))


@given(st.integers(1, 500), st.integers(0, 2**63), st.data())
@settings(max_examples=100)
def test_a_shuffle_is_a_permutation_any_part_of_which_can_be_asked_for(count, seed, data):
    keys = np.random.default_rng(seed).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    whole = shuffled(count, keys, 0, count)
    assert sorted(whole) == list(range(count))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert np.array_equal(whole[start:stop], shuffled(count, keys, start, stop))


def test_shuffles_are_uniform():
    """Where place 0 goes, and whether neighbours stay neighbours, over many keys."""
    count, draws = 10, 20_000
    keys = np.random.default_rng(0).integers(0, 2**63, (draws, ROUNDS), dtype=np.uint64)
    orders = np.stack([shuffled(count, of, 0, count) for of in keys])
    for column in orders.T:
        assert chisquare(np.bincount(column, minlength=count)).pvalue > 1e-4
    pairs = orders[:, 0] * count + orders[:, 1]
    observed = np.bincount(pairs, minlength=count**2).reshape(count, count)[~np.eye(count, dtype=bool)]
    assert chisquare(observed).pvalue > 1e-4


class Pieces:
    """Blocks of the given sizes."""

    def __init__(self, x: torch.Tensor, sizes: list[int]):
        self.whole, self.sizes, self.d_in = Activations.of(x), sizes, x.shape[1]

    def __len__(self) -> int:
        return sum(self.sizes)

    def block(self, index: int) -> Activations:
        start = sum(self.sizes[:index])
        return self.whole.with_data(self.whole.data[start : start + self.sizes[index]])

    def first(self, rows: int) -> "Pieces":
        return self


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_last_block_smaller_than_a_batch_is_left_out(fixed, name):
    x = sparse_data(640)
    pieces, cell = Pieces(x, [600, 40]), fixed(name, tokens=640)
    whole = Pieces(x[:600], [600])
    whole.whole = pieces.whole
    assert same(train(cell, pieces, [0, 1]), train_all([Job(cell, whole, [0, 1], None, [1.0, 1.0])], "", torch.device("cpu"))[0])


def test_blocks_that_fill_no_batch_are_said(cell):
    with pytest.raises(UserError, match="batch"):
        train(cell.model_copy(update={"tokens": 640, "batch": 400}), Pieces(sparse_data(640), [320, 320]), [0])


def test_a_folder_that_holds_another_training_is_refused(cell, tmp_path):
    x = sparse_data()
    train(cell, x, [0, 1], tmp_path)
    with pytest.raises(UserError, match="another training"):
        train(cell.model_copy(update={"k": 2}), x, [0, 1], tmp_path)


def test_what_a_kill_left_half_written_is_cleared(cell, tmp_path):
    x = sparse_data()
    calm = train(cell, x, [0, 1], tmp_path / "calm")
    leftover = tmp_path / "killed" / "shards" / "0-2" / "snapshots" / f"{TEMPORARY}abc" / ".tmp0123"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert same(calm, train(cell, x, [0, 1], tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


@pytest.mark.parametrize("at_once", [None, 1])
def test_snapshots_hold_the_seeds_that_lasted(fixed, tmp_path, monkeypatch, at_once):
    """And one seed's NaN stays its own: not even the shared gradient carries it to the others."""
    step = loop.Training._step

    def breaks(self, trainee, gradient, most_dead, x, at):
        if trainee.seed == 0 and at == 1:
            for part in gradient:
                part.fill_(math.nan)
            x = x * math.nan
        return step(self, trainee, gradient, most_dead, x, at)

    monkeypatch.setattr(loop.Training, "_step", breaks)
    ensemble = train(fixed("batchtopk", clip=1.0), sparse_data(), [0, 1, 2], tmp_path, at_once=at_once)
    assert ensemble.seeds == [1, 2]
    snapshots = list((tmp_path / "snapshots").iterdir())
    assert len(snapshots) == 6
    assert {load_file(file)["W_dec"].shape[0] for file in snapshots} == {2}
    monkeypatch.undo()
    assert same(ensemble, train(fixed("batchtopk", clip=1.0), sparse_data(), [1, 2]))


@pytest.mark.parametrize("guess", [0.001, 1.0, 1000.0])
def test_the_search_comes_near_the_target_from_a_guess_that_is_far_off(guess):
    coefficient, tried, found = steering.search(lambda around: [30 / c**0.7 for c in around], guess, 31)
    assert 31 / steering.NEAR < 30 / coefficient**0.7 < 31 * steering.NEAR
    assert found == [30 / c**0.7 for c in tried]


def test_a_pilot_that_diverges_does_not_stop_the_search(cell, tmp_path, monkeypatch):
    measured = {0.25: 9.0, 1.0: 5.0, 4.0: 1.5, 16.0: 0.1}
    monkeypatch.setattr(
        steering, "_l0", lambda cell, blocks, tried, *_: [measured.get(c, math.inf if c < 1.5 else 6 / c) for c in tried]
    )
    found = steering.steer(cell.model_copy(update={"variant": "relu"}), None, tmp_path, torch.device("cpu"))
    assert found == pytest.approx(2.0, rel=0.05)
    assert {"coefficient", "l0"} == set(read_json(tmp_path / "pilots.json")["pilots"][0])


def test_a_denser_pilot_has_no_more_features_than_there_are(cell):
    full = cell.model_copy(update={"k": 20})
    pilots = steering.sparser_and_denser(full, Activations.of(sparse_data()), 0.0, None, torch.device("cpu"))
    assert [pilot.k for pilot in pilots] == [14, 24]


def test_an_sae_that_never_fires_has_a_threshold():
    method = variant("batchtopk")(2)
    sae = method.initialise(4, 8, torch.Generator().manual_seed(0))
    sae.b_enc.fill_(-100)
    method.finish(sae, iter([torch.randn(16, 4)]))
    assert sae.threshold == 0


def test_clipping_many_features_gives_the_same_bits_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    gradient = [torch.randn(40_000, 5, generator=generator), torch.randn(40_000, generator=generator)]
    before, clipped = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            clipped.append([part.clone() for part in gradient])
            descent._clip(clipped[-1], 1.0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*clipped, strict=True))
