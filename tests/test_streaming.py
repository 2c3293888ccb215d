import numpy as np
import pytest
import torch

from sae_stability import pipeline
from sae_stability.errors import UserError
from sae_stability.experiments import ensembles
from sae_stability.language import activations, corpus, models
from sae_stability.language.activations import Activations, collect
from sae_stability.language.streaming import DRAWN_SEEDS, Stream
from sae_stability.loading import load_study
from sae_stability.sources import Surrogate, TokenConditional, Whitened
from sae_stability.training import train

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(model_folders):
    return models.load(str(model_folders["gpt2"]))


@pytest.fixture(scope="module")
def contexts(bridge, text_file):
    return corpus.pack(corpus.load(str(text_file)).train, bridge.tokenizer, 32)


def test_a_stream_computes_what_a_cache_holds(bridge, contexts, tmp_path):
    collect(bridge, contexts, {HOOK: tmp_path / "all.bin"}, 10**9, torch.float32)
    cached = Activations.open(tmp_path / "all.bin")
    stream = Stream(bridge, contexts, [HOOK], tokens=3000, dtype=torch.float32, block_tokens=700)
    site = stream.site(HOOK, 10**9)
    blocks = [site.block(index) for index in range(len(site.sizes))]
    assert [len(block) for block in blocks] == site.sizes
    assert len(site) >= 3000 > len(site) - 700
    assert max(site.sizes) <= 700 + 32
    streamed = torch.cat([block.data for block in blocks])
    # Every token is computed once: each streamed row is another row of the cache.
    nearest = torch.cdist(streamed, cached.data)
    assert nearest.min(1).values.max() < 1e-3 < 0.1 < nearest.median()
    assert all(torch.equal(block.mean, blocks[0].mean) and block.scale == blocks[0].scale for block in blocks)
    torch.testing.assert_close(blocks[0].mean, blocks[0].data.mean(0), atol=1e-5, rtol=1e-5)


def test_blocks_can_be_asked_for_again_and_shortened(bridge, contexts):
    stream = Stream(bridge, contexts, [HOOK], tokens=2000, block_tokens=600)
    site = stream.site(HOOK, 10**9)
    first = site.block(0).data.clone()
    site.block(2)
    assert torch.equal(site.block(0).data, first)
    short = site.first(site.sizes[0] + 10)
    assert short.sizes == [site.sizes[0], 10]
    assert torch.equal(short.block(1).data, site.block(1).data[:10])
    assert stream.site(HOOK, 10**9).first(5).sizes == [5]


def test_one_forward_pass_feeds_all_sites(bridge, contexts, monkeypatch):
    calls = []
    forward = activations.forward
    monkeypatch.setattr(activations, "forward", lambda *given: calls.append(1) or forward(*given))
    other = "blocks.0.hook_resid_post"
    stream = Stream(bridge, contexts, [HOOK, other], tokens=600, block_tokens=600)
    for hook in (HOOK, other):
        stream.site(hook, 10**9).block(0)
        stream.drawn(hook, Surrogate.fit, 10**9).block(0)
    assert len(calls) == -(-len(stream.rows[0]) // 16)


def test_a_streamed_surrogate_has_the_moments_of_the_first_block(bridge, contexts):
    stream = Stream(bridge, contexts, [HOOK], tokens=4000, dtype=torch.float32, block_tokens=4000)
    real, drawn = stream.site(HOOK, 10**9).block(0), stream.drawn(HOOK, Surrogate.fit, 10**9).block(0)
    spread = real.covariance.diagonal().sqrt().max()
    assert torch.equal(drawn.mean, Activations.of(drawn.data).mean)  # its own, as of every source
    assert drawn.scale == pytest.approx(real.scale, rel=0.05)
    assert (drawn.data.mean(0) - real.mean).abs().max() < 0.1 * spread
    assert (torch.cov(drawn.data.T) - real.covariance).norm() < 0.2 * real.covariance.norm()


def test_a_streamed_null_is_trained_under_its_own_normalisation(bridge, contexts):
    stream = Stream(bridge, contexts, [HOOK], tokens=4000, dtype=torch.float32, block_tokens=2000)
    first, second = (stream.drawn(HOOK, Whitened.fit, 10**9).block(index) for index in (0, 1))
    assert first.scale == pytest.approx(1, rel=0.05)  # whitened: the identity as covariance
    assert (first.scale, len(first)) == (second.scale, stream.sizes[0])
    assert not torch.equal(first.data[:50], second.data[:50])


@pytest.mark.parametrize("fit", [None, Surrogate.fit, Whitened.fit, TokenConditional.fit])
def test_what_a_cell_is_trained_on_does_not_depend_on_who_else_reads_the_stream(bridge, contexts, fit):
    """A cell of fewer tokens than a block, alone and beside one of more."""
    alone, beside = (Stream(bridge, contexts, [HOOK], tokens=tokens, dtype=torch.float32) for tokens in (400, 1800))
    assert alone.sizes[0] < beside.sizes[0]
    one, other = (
        (stream.site(HOOK, 400) if fit is None else stream.drawn(HOOK, fit, 400)).first(400).block(0) for stream in (alone, beside)
    )
    assert torch.equal(one.mean, other.mean)
    assert one.scale == other.scale
    assert torch.equal(one.data, other.data)


def test_streamed_nulls_are_other_draws_than_cached_ones():
    """A generator of PyTorch keeps 32 bits of a seed, and cached nulls have the first ones."""
    drawn, cached = (
        [torch.randn(4, generator=torch.Generator().manual_seed(first + index)) for index in range(4)] for first in (DRAWN_SEEDS, 0)
    )
    assert not any(torch.equal(one, other) for one in drawn for other in cached)


def test_training_on_blocks_resumes_to_the_same_bits(cell, bridge, contexts, tmp_path, monkeypatch):
    site = Stream(bridge, contexts, [HOOK], tokens=2048, block_tokens=500).site(HOOK, 10**9)
    small = cell.model_copy(update={"tokens": 2000, "passes": 2})
    whole = train(small, site, [0, 1], tmp_path / "a", checkpoint_seconds=0)
    block = type(site).block
    calls = iter(range(10**6))

    def dies(self, index):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return block(self, index)

    monkeypatch.setattr(type(site), "block", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small, site, [0, 1], tmp_path / "b", checkpoint_seconds=0)
    monkeypatch.setattr(type(site), "block", block)
    resumed = train(small, site, [0, 1], tmp_path / "b", checkpoint_seconds=0)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters, resumed.parameters, strict=True))
    assert (tmp_path / "a/curve.json").read_bytes() == (tmp_path / "b/curve.json").read_bytes()


def test_a_streamed_study_trains_all_cells_from_one_pass_over_the_text(house, small, monkeypatch):
    study = load_study(
        "embedded", [*small, "stream=true", "nulls=[surrogate,randomised]", "grid={d_sae: [32], k: [3]}"], "streamed"
    )
    passes = []
    compute = Stream._compute

    def counted(self, index):
        passes.append(self.held is None or self.held[0] != index)
        return compute(self, index)

    monkeypatch.setattr(Stream, "_compute", counted)
    pipeline.compute(study)
    plan = pipeline.Plan(study)
    for cell in study.cells.values():
        for kind in cell.kinds:
            assert len(ensembles.ensemble(plan.results(cell), kind).seeds) == 4
    assert not list(house.rglob("train.bin"))
    assert sum(passes) == 2  # one block, of the model and of its copy with shuffled weights


def test_shuffled_weights_keep_their_values_and_lose_what_was_learnt(model_folders):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folders["neox"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    models.shuffle_weights(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("dense" in name for name in moved)
    again = AutoModelForCausalLM.from_pretrained(model_folders["neox"])
    models.shuffle_weights(again)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_device_that_is_not_there_is_said(cell, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device"):
        train(cell, torch.from_numpy(np.random.default_rng(0).normal(size=(2048, 8))).float(), [0], device="cuda")
