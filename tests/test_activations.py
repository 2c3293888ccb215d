import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sae_stability.errors import UserError
from sae_stability.language import models
from sae_stability.language.activations import BATCH, Activations, collect, forward, forward_all, kept, longest_norms, whitening
from sae_stability.language.corpus import Contexts, load, pack
from sae_stability.language.site import Site
from sae_stability.language.tokens import check_ids
from sae_stability.matching.criteria import without_top_component
from sae_stability.sources import Surrogate, write_drawn
from sae_stability.study import HOOKS


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "gemma2"])
def test_activations_are_those_of_hugging_face_without_bos(model_folders, text_file, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    bridge = models.load(str(model_folders[architecture]))
    contexts = pack(load(str(text_file)).train[:60], bridge.tokenizer, 32)
    hooks = {f"blocks.{layer}.hook_resid_post": tmp_path / f"{layer}.bin" for layer in (0, 1)}
    collect(bridge, contexts, hooks, tokens=500, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_folders[architecture])
    with torch.inference_mode():
        hidden = model(torch.from_numpy(contexts.tokens).long(), output_hidden_states=True).hidden_states
    for layer, path in enumerate(hooks.values()):
        found = Activations.open(path)
        expected = hidden[layer + 1][torch.from_numpy(contexts.is_text)][:500]
        torch.testing.assert_close(found.data, expected, atol=1e-5, rtol=1e-4)


def test_batches_side_by_side_are_those_of_one_model_in_the_order_of_the_text(model_folders, text_file):
    bridge, hooks = models.load(str(model_folders["gpt2"])), ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    contexts = pack(load(str(text_file)).train, bridge.tokenizer, 32)
    rows = np.random.default_rng(0).permutation(len(contexts.tokens))[: 5 * BATCH - 3]
    found = list(forward_all(bridge, contexts, rows, hooks))
    assert len(found) == 5
    for start, of_batch in enumerate(found):
        expected = forward(bridge, contexts, rows[start * BATCH : (start + 1) * BATCH], hooks)
        for hook in hooks:
            torch.testing.assert_close(of_batch[hook], expected[hook], atol=1e-5, rtol=1e-5)


def test_normalised_activations_have_mean_zero_and_norm_sqrt_d(model_folders):
    x = torch.randn(5000, 8) * torch.arange(1, 9) + 3
    normalised = Activations.of(x).normalised(slice(None))
    torch.testing.assert_close(normalised.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert normalised.square().sum(1).mean().sqrt().item() == pytest.approx(8**0.5, rel=1e-4)


def test_bfloat16_on_disk_is_the_same_up_to_its_precision(model_folders, text_file, tmp_path):
    bridge = models.load(str(model_folders["gpt2"]))
    contexts = pack(load(str(text_file)).train[:20], bridge.tokenizer, 32)
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        collect(bridge, contexts, {"blocks.1.hook_resid_pre": tmp_path / f"{name}.bin"}, 200, dtype)
    half, full = (Activations.open(tmp_path / f"{name}.bin") for name in ("half", "full"))
    assert torch.equal(half.data, full.data.bfloat16())
    assert (tmp_path / "half.bin").stat().st_size * 2 == (tmp_path / "full.bin").stat().st_size


def test_a_hook_that_the_model_lacks_is_said_with_its_neighbour(model_folders):
    bridge = models.load(str(model_folders["gpt2"]))
    with pytest.raises(UserError, match=r"hook_name: the model has no blocks.7.hook_resid_post, did you mean blocks"):
        models.check_hook(bridge, "blocks.7.hook_resid_post")
    with pytest.raises(UserError, match="context: the model reads 64"):
        models.context_length(bridge, 65)
    assert models.context_length(bridge, None) == 64


def test_folders_that_hold_no_model_are_said(tmp_path, model_folders):
    with pytest.raises(UserError, match=r"no config\.json"):
        models.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer"):
        models.locate(str(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        models.locate("/no/such/folder")
    (tmp_path / "tokenizer.json").write_text((model_folders["gpt2"] / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="can't be loaded"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
def test_what_is_written_at_any_hook_reaches_the_logits(model_folders, architecture):
    bridge = models.load(str(model_folders[architecture]))
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def logits(hook: str):
        with torch.inference_mode():
            return bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda value, hook: value + push)])

    with torch.inference_mode():
        clean = bridge(ids)
    for hook in HOOKS:
        assert (logits(f"blocks.1.{hook}") - clean).abs().max() > 1e-3
    # What the MLP writes is a summand of the block's output.
    torch.testing.assert_close(logits("blocks.1.hook_mlp_out"), logits("blocks.1.hook_resid_post"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits("blocks.1.hook_resid_post"), logits("blocks.2.hook_resid_pre"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [16, 17])
def test_asking_for_more_tokens_than_there_are_gives_all(model_folders, text_file, tmp_path, count):
    bridge = models.load(str(model_folders["neox"]))
    packed = pack(load(str(text_file)).train, bridge.tokenizer, 32)
    contexts = Contexts(packed.tokens[:count], packed.cluster[:count], packed.is_text[:count])
    collect(bridge, contexts, {"blocks.0.hook_resid_post": tmp_path / "x.bin"}, 10**6)
    assert len(Activations.open(tmp_path / "x.bin")) == contexts.is_text.sum()


def test_no_position_without_text_is_collected(model_folders, tmp_path):
    bridge = models.load(str(model_folders["gpt2"]))
    tokens = np.array([[0, 5, 6, 0, 7, 0, 8, 9]] * 3, dtype=np.int32)
    contexts = Contexts(tokens, np.zeros_like(tokens), tokens != 0)
    collect(bridge, contexts, {"blocks.0.hook_resid_post": tmp_path / "x.bin"}, 1000)
    assert len(Activations.open(tmp_path / "x.bin")) == 15


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize(
    "hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"]
)
def test_going_on_from_a_site_predicts_what_the_whole_model_does(model_folders, text_file, architecture, hook_name):
    bridge = models.load(str(model_folders[architecture]))
    contexts = pack(load(str(text_file)).train[:60], bridge.tokenizer, 32)
    site = Site(bridge, hook_name)
    for start in (0, 8):  # the second text is not read with what was kept of the first
        ids = torch.from_numpy(contexts.tokens[start : start + 8]).long()
        with torch.inference_mode():
            value, logits = site.read(ids)
            torch.testing.assert_close(logits, bridge(ids))
            changed = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
            expected = bridge.run_with_hooks(ids, fwd_hooks=[(hook_name, lambda _, hook, changed=changed: changed)])
            for given, wanted in ((value, logits), (changed, expected)):
                for chosen in (torch.ones_like(ids, dtype=torch.bool), ids % 2 == 0):
                    found = torch.cat(list(site.predict(given, chosen)))
                    torch.testing.assert_close(found, wanted[chosen], atol=1e-4, rtol=0)
    assert site._resumes is hook_name.endswith("hook_resid_post")


def test_a_model_that_transforms_its_logits_runs_as_a_whole(model_folders, text_file, monkeypatch):
    bridge = models.load(str(model_folders["gpt2"]))
    ids = torch.from_numpy(pack(load(str(text_file)).train[:20], bridge.tokenizer, 32).tokens[:4]).long()
    hooked = type(bridge).run_with_hooks
    monkeypatch.setattr(type(bridge), "run_with_hooks", lambda *given, **options: hooked(*given, **options).tanh())
    site = Site(bridge, "blocks.0.hook_resid_post")
    with torch.inference_mode():
        value, logits = site.read(ids)
        chosen = ids % 2 == 0
        torch.testing.assert_close(torch.cat(list(site.predict(value, chosen))), logits[chosen])


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
def test_bfloat16_models_compute_the_same_activations_up_to_their_precision(model_folders, text_file, architecture):
    full, half = (models.load(str(model_folders[architecture]), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    contexts = pack(load(str(text_file)).train[:60], full.tokenizer, 32)
    for hook_name in ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post"):
        exact, rounded = (forward(bridge, contexts, slice(8), [hook_name])[hook_name] for bridge in (full, half))
        assert rounded.dtype == torch.bfloat16
        apart = (rounded.float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert 0 < apart.max() < 0.03  # a unit in the last place is 0.008


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
def test_a_bfloat16_model_goes_on_from_its_blocks_as_it_does_as_a_whole(model_folders, text_file, architecture):
    bridge = models.load(str(model_folders[architecture]), dtype=torch.bfloat16)
    ids = torch.from_numpy(pack(load(str(text_file)).train[:20], bridge.tokenizer, 32).tokens[:4]).long()
    site, everywhere = Site(bridge, "blocks.1.hook_resid_post"), torch.ones_like(ids, dtype=torch.bool)
    with torch.inference_mode():
        value, logits = site.read(ids)
        assert torch.equal(torch.cat(list(site.predict(value, everywhere))), logits[everywhere])
    assert site._resumes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong", [lambda logits: 30 * (logits / 30).tanh(), lambda logits: 0.95 * logits, lambda logits: logits.roll(1, 1)]
)
def test_a_wrong_continuation_is_told_from_rounding(model_folders, text_file, monkeypatch, dtype, wrong):
    bridge = models.load(str(model_folders["gpt2"]), dtype=dtype)
    with torch.no_grad():
        bridge.ln_final.weight.mul_(50)  # logits as large as those of trained models
    ids = torch.from_numpy(pack(load(str(text_file)).train[:20], bridge.tokenizer, 32).tokens[:4]).long()
    hooked = type(bridge).run_with_hooks
    monkeypatch.setattr(type(bridge), "run_with_hooks", lambda *given, **options: wrong(hooked(*given, **options)))
    site = Site(bridge, "blocks.0.hook_resid_post")
    with torch.inference_mode():
        _, logits = site.read(ids)
    assert 5 < logits.abs().max() < 50
    assert site._resumes is False


def test_a_gpu_that_is_not_there_is_one_line(model_folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device: .*set device to cpu"):
        models.load(str(model_folders["gpt2"]), device="cuda")


def test_tokens_that_are_too_long_are_left_out_and_others_read_in_their_place(model_folders, text_file, tmp_path):
    bridge, hook = models.load(str(model_folders["gpt2"])), "blocks.1.hook_resid_post"
    contexts = pack(load(str(text_file)).train[:60], bridge.tokenizer, 32)
    collect(bridge, contexts, {hook: tmp_path / "all.bin"}, 10**6, torch.float32)
    everything = Activations.open(tmp_path / "all.bin").data
    norms = everything.norm(dim=1)
    assert longest_norms(bridge, contexts, [hook], 1.1)[hook] == pytest.approx(1.1 * norms.median().item(), rel=1e-5)
    longest = norms.quantile(0.7).item()
    collect(bridge, contexts, {hook: tmp_path / "cut.bin"}, 500, torch.float32, longest={hook: longest})
    found = Activations.open(tmp_path / "cut.bin").data
    assert torch.equal(found, everything[norms <= longest][:500])
    remaining = kept(tmp_path / "cut.bin", contexts)
    ids = contexts.tokens[contexts.is_text][(norms <= longest).numpy()][:500]
    assert (remaining.tokens[remaining.is_text][:500] == ids).all()  # rows and tokens stay side by side
    assert kept(tmp_path / "all.bin", contexts) is contexts


class Recorded(TorchDispatchMode):
    """Notes with how many threads each product and decomposition is called."""

    def __init__(self):
        super().__init__()
        self.threads: dict[str, set[int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.name().removeprefix("aten::").partition(".")[0]
        if name in {"mm", "addmm", "_linalg_eigh", "sum"}:
            self.threads.setdefault(name, set()).add(torch.get_num_threads())
        return operation(*arguments, **(options or {}))


def test_what_saes_are_trained_on_is_summed_by_one_thread(tmp_path):
    # MKL gives other bits for other numbers of threads on some processors only: here it is asked how many there are.
    x = torch.randn(9000, 12, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Recorded() as recorded:
            real = Activations.of(x)
            tokens = torch.zeros(len(x), dtype=torch.long)
            write_drawn(Surrogate.fit(real, tokens), real, tokens, tmp_path / "surrogate.bin", 0, "surrogate")
            whitening(real.covariance, 1e-6)
            without_top_component(real.covariance)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert recorded.threads == {"mm": {1}, "_linalg_eigh": {1}, "sum": {1}}


@pytest.mark.parametrize("threads", [1, 3])
def test_moments_are_the_same_bits_for_every_number_of_threads(threads):
    x = 300 + torch.randn(9001, 24, generator=torch.Generator().manual_seed(0))
    two = Activations.of(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        other = Activations.of(x)
    finally:
        torch.set_num_threads(before)
    assert two.scale == other.scale
    assert torch.equal(two.mean, other.mean)
    assert torch.equal(two.covariance, other.covariance)
    exact = torch.from_numpy(np.cov(x.double().numpy().T, bias=True))
    assert (two.covariance - exact).abs().max() < 1e-6


def changed_weights(folder, to, change):
    """A copy of a model's folder with other weights in it."""
    shutil.copytree(folder, to)
    weights = change(load_file(to / "model.safetensors"))
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()}, "lack what its config.json asks for"),
        (lambda w: {name: tensor for name, tensor in w.items() if ".h.1." not in name}, "lack what its config.json asks for"),
        (lambda w: w | {"transformer.h.9.mlp.c_fc.weight": torch.ones(3, 3)}, "have more than what its config.json asks for"),
        (lambda w: {n: t[:, :-1].contiguous() if n.endswith("wpe.weight") else t for n, t in w.items()}, "wpe"),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_computed(model_folders, tmp_path, change, said):
    folder = changed_weights(model_folders["gpt2"], tmp_path / "model", change)
    with pytest.raises(UserError, match=said) as error:
        models.load(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_what_older_releases_and_other_tasks_put_beside_the_weights_is_no_fault(model_folders, tmp_path):
    beside = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "v_head.summary.weight": torch.ones(1, 3)}
    folder = changed_weights(model_folders["gpt2"], tmp_path / "model", lambda w: w | beside)
    assert models.load(str(folder)).cfg.n_layers == models.load(str(model_folders["gpt2"])).cfg.n_layers


def test_a_token_without_an_embedding_is_said(model_folders):
    bridge = models.load(str(model_folders["gpt2"]))
    size = bridge.cfg.d_vocab
    check_ids(bridge, np.array([[0, size - 1]]))
    with pytest.raises(UserError, match=f"gives token {size}, and the model embeds {size}"):
        check_ids(bridge, np.array([[0, size - 1]]), np.array([[size]]))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_hooks_before_and_behind_all_blocks_and_those_with_heads_give_a_vector_a_token(model_folders, text_file, architecture):
    bridge = models.load(str(model_folders[architecture]))
    contexts = pack(load(str(text_file)).evaluation[:20], bridge.tokenizer, 32)
    rows, tokens = slice(0, 2), int(contexts.is_text[:2].sum())
    whole = {hook: forward(bridge, contexts, rows, [hook])[hook] for hook in ("hook_embed", "ln_final.hook_normalized")}
    assert all(x.shape == (tokens, bridge.cfg.d_model) for x in whole.values())
    heads = forward(bridge, contexts, rows, ["blocks.0.attn.hook_z"])["blocks.0.attn.hook_z"]
    assert heads.shape == (tokens, bridge.cfg.n_heads * bridge.cfg.d_head)
    together = forward(bridge, contexts, rows, ["blocks.0.hook_resid_post", "hook_embed"])
    assert torch.equal(together["hook_embed"], whole["hook_embed"])
    with pytest.raises(UserError, match="no vector a token"):
        forward(bridge, contexts, rows, ["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize(
    ("name", "said"), [("docstrings_2l", "did you mean docstrings-2l"), ("models/docstrings-2l", "did you mean")]
)
def test_a_misspelt_name_of_ours_is_corrected_before_any_network_is_asked(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        models.locate(name)
    assert models.locate("someone/another-model") == "someone/another-model"
