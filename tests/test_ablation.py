"""Removals against brute force, on SAEs of every variant, and on SAEs whose features' effects are known by construction."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from sae_stability import ablation, threads
from sae_stability.ablation import removal
from sae_stability.ablation.controls import CALIPER, CURVE_SEEDS, ORDERS, SHARES
from sae_stability.ablation.translation import BROADER, CONTAINED, FATES, PREDICTED, RAREST
from sae_stability.evaluation import Encoded, fit
from sae_stability.language import models
from sae_stability.language.activations import Activations, forward
from sae_stability.language.corpus import load, pack
from sae_stability.language.interventions import Reading, intervene
from sae_stability.matching import stability
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sparse import Codes, Parameters
from sae_stability.saes.squares import squared_errors
from sae_stability.study import Variants

HOOK = "blocks.1.hook_resid_post"
TOKENS = 400
D_SAE, K = 48, 4


def random_ensemble(name: str, activations: Activations, seeds: int = 2) -> Ensemble:
    """Untrained SAEs with nothing left at zero, whose features fire on real activations."""
    generator = torch.Generator().manual_seed(0)
    method = variant(name)(K)
    saes = [method.initialise(activations.d_in, D_SAE, generator) for _ in range(seeds)]
    moved = [[0.05 * torch.randn(tensor.shape, generator=generator) + tensor for tensor in sae] for sae in saes]
    parameters = type(saes[0])(*(torch.stack(tensors) for tensors in zip(*moved, strict=True)))
    parameters = parameters._replace(W_dec=F.normalize(parameters.W_dec, dim=2))
    if hasattr(parameters, "threshold"):
        parameters = parameters._replace(threshold=torch.full_like(parameters.threshold, 1.0))
    return Ensemble(name, K, list(range(seeds)), parameters, activations.mean, activations.scale)


def alone(encoded: Encoded) -> ablation.Impact:
    """The impact of each feature on reconstruction, whatever the text."""
    return ablation.impact_on_reconstruction(encoded, np.zeros(len(encoded.activations), dtype=int), {})


@pytest.fixture(scope="module")
def site(model_folders, text_file):
    """A model, held-out contexts, and the activations of their text at one hook point."""
    bridge = models.load(str(model_folders["gpt2"]))
    contexts = pack(load(str(text_file)).evaluation, bridge.tokenizer, 32).spread(TOKENS)
    x = forward(bridge, contexts, slice(None), [HOOK])[HOOK].clone()
    return SimpleNamespace(
        bridge=bridge,
        contexts=contexts,
        reading=Reading(bridge, HOOK, contexts, TOKENS),
        activations=Activations.of(x),
        cluster=contexts.cluster[contexts.is_text],
    )


@pytest.fixture(scope="module")
def members():
    """Two sets that share no feature and hold all of them, and the empty one."""
    generator = torch.Generator().manual_seed(1)
    half = torch.rand(2, D_SAE, generator=generator) < 0.4
    return {("band", "stable"): half, ("band", "unstable"): ~half, ("none", ""): half & False, ("all", ""): half | True}


def test_codes_are_the_same_in_batches_and_as_a_whole(site, monkeypatch):
    ensemble = random_ensemble("batchtopk", site.activations)
    whole = ensemble.encode(site.activations.data)
    monkeypatch.setattr("sae_stability.evaluation.ROWS", 7)
    encoded = Encoded.of(ensemble, site.activations)
    assert len(encoded.codes) == -(-len(site.activations) // 7)
    for seed in range(2):
        dense = torch.from_numpy(encoded.matrix(seed).toarray())
        torch.testing.assert_close(dense, whole[seed], atol=1e-5, rtol=1e-5)
        parts = [coded[seed][1].dense(D_SAE) for _, _, coded in encoded.batches()]
        assert torch.equal(torch.cat(parts), dense)
    rows = [site.activations.data[rows] for rows, _, _ in encoded.batches()]
    assert torch.equal(torch.cat(rows), site.activations.data)


@pytest.mark.parametrize("name", Variants.__args__)
def test_marginal_impact_is_what_removing_each_feature_does(site, name):
    ensemble = random_ensemble(name, site.activations)
    found = alone(Encoded.of(ensemble, site.activations))
    x, z = ensemble.normalise(site.activations.data).double(), ensemble.encode(site.activations.data).double()
    W_dec, b_dec = ensemble.W_dec.double(), ensemble.parameters.b_dec.double()
    whole = z @ W_dec + b_dec[:, None]
    for feature in range(D_SAE):
        without = whole - z[:, :, feature, None] * W_dec[:, None, feature]
        grown = (x - without).square().sum((1, 2)) - (x - whole).square().sum((1, 2))
        torch.testing.assert_close(found.reconstruction[:, feature], grown, rtol=1e-5, atol=1e-5 * x.square().sum().item() / D_SAE)
    torch.testing.assert_close(found.energy, (z[..., None] * W_dec[:, None]).square().sum((1, 3)), rtol=1e-5, atol=1e-4)


def test_the_impact_of_features_in_another_order_is_the_same_in_that_order(site):
    ensemble, order = random_ensemble("topk", site.activations), torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    moved = ensemble.with_parameters(
        W_enc_rows=ensemble.parameters.W_enc_rows[:, order],
        b_enc=ensemble.parameters.b_enc[:, order],
        W_dec=ensemble.W_dec[:, order],
    )
    one, other = (alone(Encoded.of(of, site.activations)).reconstruction for of in (ensemble, moved))
    torch.testing.assert_close(one[:, order], other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "gated"])
def test_removed_and_kept_errors_are_those_of_dense_codes(site, members, name):
    ensemble = random_ensemble(name, site.activations)
    found = ablation.on_reconstruction(Encoded.of(ensemble, site.activations), site.cluster, members)
    measured = fit(ensemble, site.activations, site.cluster)
    np.testing.assert_allclose(found.intact, measured.residual, rtol=1e-5)
    np.testing.assert_allclose(found.total, measured.total, rtol=1e-5)
    np.testing.assert_allclose(found.removed["none", ""], found.intact, rtol=1e-5)
    np.testing.assert_allclose(found.kept["all", ""], found.intact, rtol=1e-5)
    x, z = ensemble.normalise(site.activations.data), ensemble.encode(site.activations.data)
    for set_name, member in members.items():
        left = (z * ~member[:, None]) @ ensemble.W_dec + ensemble.parameters.b_dec[:, None]
        np.testing.assert_allclose(found.removed[set_name].sum(1), (x - left).square().sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found.kept["band", "stable"], found.removed["band", "unstable"], rtol=1e-4)


def test_squared_errors_are_those_of_what_sets_write_token_by_token():
    draw = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 3, 3, 8, 9])  # one token on which nothing fires
    features = torch.cat([torch.randperm(11, generator=draw)[:count] for count in starts.diff()])
    codes = Codes(starts, features, torch.rand(9, generator=draw))
    target, error, W_dec = (torch.randn(rows, 37, generator=draw) for rows in (4, 4, 11))
    members = torch.rand(5, 11, generator=draw) < 0.5
    members[0], members[1] = False, True
    added, left = squared_errors(target, error, codes, W_dec, members)
    for of, member in enumerate(members):
        written = (codes.dense(11) * member) @ W_dec
        assert torch.allclose(added[of], (error + written).square().sum(1), rtol=1e-5)
        assert torch.allclose(left[of], (target - written).square().sum(1), rtol=1e-5)
    assert torch.allclose(left[0], target.square().sum(1))
    with threads.single():
        alone = squared_errors(target, error, codes, W_dec, members)
    assert all(torch.equal(*same) for same in zip(alone, (added, left), strict=True))
    for here, directions, sets in ((error[:, 1:], W_dec, members), (error, W_dec[:, 1:], members), (error, W_dec, members[:, 1:])):
        with pytest.raises(ValueError, match="do not fit one another"):
            squared_errors(target, here, codes, directions, sets)
    for broken in (
        codes._replace(features=features + 11),
        codes._replace(starts=starts[:-1]),
        codes._replace(values=codes.values[:-1]),
        codes._replace(starts=torch.tensor([0, 3, 2, 8, 9])),
    ):
        with pytest.raises(ValueError, match="are no matrix of 4 tokens and 11 features"):
            squared_errors(target, error, broken, W_dec, members)


def test_the_reconstruction_with_its_error_restores_the_logits(site):
    ensemble = random_ensemble("topk", site.activations)
    ids, text = torch.from_numpy(site.contexts.tokens).long(), torch.from_numpy(site.contexts.is_text)

    def splice(value, hook):
        x, value = value[text], value.clone()
        value[text] = ensemble.reconstruct(0, x) + (x - ensemble.reconstruct(0, x))
        return value

    with torch.inference_mode():
        clean, spliced = site.bridge(ids), site.bridge.run_with_hooks(ids, fwd_hooks=[(HOOK, splice)])
    torch.testing.assert_close(spliced, clean, atol=1e-4, rtol=0)


def test_predictions_without_sets_are_consistent(site, members):
    ensemble, one, other = random_ensemble("topk", site.activations), ("band", "stable"), ("band", "unstable")
    names = list(members)
    readings = {"removed": names, "kept": names, "spliced": names, "only": names}
    found = ablation.on_prediction(site.reading, ensemble, members, readings)

    def edits(x):
        yield "bias", ensemble.to_raw(ensemble.parameters.b_dec[0]).expand_as(x)
        yield "spliced", ensemble.reconstruct(0, x)
        yield "by hand", x - (ensemble.encode(x)[0] * members[one][0]) @ ensemble.W_dec[0] / ensemble.scale

    by_hand = intervene(site.reading, edits)

    def close(reading, name, nats):
        np.testing.assert_allclose(found.nats[(reading, *name, 0)], nats, rtol=1e-5, atol=1e-4)

    close("removed", ("none", ""), found.clean)
    close("kept", ("all", ""), found.clean)
    close("removed", one, by_hand.nats["by hand"])
    close("kept", other, by_hand.nats["by hand"])
    close("spliced", ("none", ""), by_hand.nats["spliced"])
    close("only", ("all", ""), by_hand.nats["spliced"])
    close("spliced", ("all", ""), by_hand.nats["bias"])
    close("only", ("none", ""), by_hand.nats["bias"])
    close("spliced", one, found.nats[("only", *other, 0)])
    assert abs(found.divergence[("removed", "none", "", 0)]).max() < 1e-4
    assert found.divergence[("removed", "all", "", 0)].sum() > 0
    assert found.tokens.sum() == site.contexts.is_text[:, 1:].sum()


def test_losses_and_divergences_are_those_of_whole_logits(site, monkeypatch):
    """Logits come in chunks of positions; cross-entropy and KL are PyTorch's on all of them."""
    monkeypatch.setattr("sae_stability.language.site.CHUNK", 7)
    monkeypatch.setattr("sae_stability.language.interventions.CHUNK", 7)
    moved = torch.randn(site.activations.d_in, generator=torch.Generator().manual_seed(0))

    def edits(x):
        yield "moved", x + moved

    found = intervene(site.reading, edits)
    ids, text = torch.from_numpy(site.contexts.tokens).long(), torch.from_numpy(site.contexts.is_text)

    def write(value, hook):
        return value + moved * text[..., None]

    with torch.inference_mode():
        logits = site.bridge(ids), site.bridge.run_with_hooks(ids, fwd_hooks=[(HOOK, write)])
    targets = text[:, 1:]
    clean, changed = (of[:, :-1][targets].double().log_softmax(1) for of in logits)
    wanted = ids[:, 1:][targets]
    assert found.clean.sum() == pytest.approx(F.nll_loss(clean, wanted, reduction="sum").item(), rel=1e-5)
    assert found.nats["moved"].sum() == pytest.approx(F.nll_loss(changed, wanted, reduction="sum").item(), rel=1e-5)
    divergence = F.kl_div(changed, clean, log_target=True, reduction="sum").item()
    assert found.divergence["moved"].sum() == pytest.approx(divergence, rel=1e-4)


def test_losses_of_a_bfloat16_model_are_float32s_up_to_its_precision(site, model_folders):
    half = models.load(str(model_folders["gpt2"]), dtype=torch.bfloat16)

    def edits(x):
        yield "spliced back", x.float()
        yield "zero", torch.zeros_like(x)

    exact, found = (intervene(replace(site.reading, bridge=bridge), edits) for bridge in (site.bridge, half))
    assert found.clean.dtype == np.float64
    assert np.array_equal(found.nats["spliced back"], found.clean)  # the clean activation spliced back changes nothing
    assert abs(found.divergence["spliced back"]).max() < 1e-6 * found.clean.max()
    for name in ("spliced back", "zero"):
        np.testing.assert_allclose(found.nats[name], exact.nats[name], rtol=0.01)
    assert len({nats % 2**-4 for nats in found.clean}) > 1  # sums in bfloat16 would have no digits behind the point


def test_gradients_flow_through_a_bfloat16_model(site, model_folders):
    half, ensemble = models.load(str(model_folders["gpt2"]), dtype=torch.bfloat16), random_ensemble("topk", site.activations)
    exact, found = (ablation.impact_on_prediction(replace(site.reading, bridge=bridge), ensemble) for bridge in (site.bridge, half))
    for of in (found.first_order, found.second_order):
        assert of.isfinite().all()
        assert of.abs().sum() > 0
    assert (found.first_order - exact.first_order).norm() < 0.05 * exact.first_order.norm()


def test_first_order_impact_becomes_exact_as_contributions_become_small(site):
    ensemble, features = random_ensemble("topk", site.activations), torch.arange(20).expand(2, 20)
    apart = []
    for size in (0.3, 0.03):
        small = ensemble.with_parameters(W_dec=ensemble.W_dec * size)
        first_order = ablation.impact_on_prediction(site.reading, small).first_order[:, :20]
        true = ablation.true_impact_on_prediction(site.reading, small, features)
        apart.append(((first_order - true).abs().sum() / true.abs().sum()).item())
    assert apart[1] < 0.05
    assert apart[1] < 0.5 * apart[0]


def planted(twins: bool) -> tuple[Ensemble, Activations, np.ndarray, torch.Tensor]:
    """An SAE that reconstructs exactly: four of eight orthogonal features in each token, with known strengths.

    A second half of features never fires. With `twins` it repeats the first with lower biases: each fires once its twin is gone.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    firing = torch.rand(4000, 8, generator=generator).argsort(1) < 4
    strengths = firing * torch.linspace(3, 2.5, 8)
    x = strengths @ directions[:8]
    W = torch.cat([directions[:8], directions[:8] if twins else directions[8:]])[None]
    b_enc = torch.cat([torch.zeros(8), torch.full((8,), -1.0 if twins else -100.0)])[None]
    ensemble = Ensemble("topk", 4, [0], Parameters(W, b_enc, W, torch.zeros(1, 16)), torch.zeros(16), 1.0)
    return ensemble, Activations.of(x), np.repeat(np.arange(400), 10), strengths


def test_planted_features_lose_their_energy_and_no_more():
    ensemble, activations, cluster, strengths = planted(twins=False)
    member = torch.zeros(1, 16, dtype=torch.bool)
    member[0, :3] = True
    found = ablation.on_reconstruction(Encoded.of(ensemble, activations), cluster, {("band", "stable"): member})
    assert found.intact.sum() < 1e-6
    assert found.removed["band", "stable"].sum() == pytest.approx(strengths[:, :3].square().sum().item(), rel=1e-4)
    assert found.kept["band", "stable"].sum() == pytest.approx(strengths[:, 3:].square().sum().item(), rel=1e-4)
    impact = alone(Encoded.of(ensemble, activations))
    expected = torch.cat([strengths.square().sum(0), torch.zeros(8)]).double()[None]
    torch.testing.assert_close(impact.reconstruction, expected, rtol=1e-4, atol=1e-3)


def test_features_with_a_twin_are_missed_with_fixed_codes_and_not_once_codes_are_chosen_again():
    ensemble, activations, cluster, strengths = planted(twins=True)
    member = torch.zeros(1, 16, dtype=torch.bool)
    member[0, :3] = True
    name = ("band", "stable")
    fixed = ablation.on_reconstruction(Encoded.of(ensemble, activations), cluster, {name: member})
    again = ablation.reselected(ensemble, activations, cluster, member | True, {name: member, ("all", ""): member | True})
    energy = strengths[:, :3].square().sum().item()
    assert fixed.removed[name].sum() - fixed.intact.sum() > 0.5 * energy
    assert again.removed[name].sum() - again.intact.sum() < 0.01 * energy
    # With no feature left nothing but the mean is fitted.
    np.testing.assert_allclose(again.removed["all", ""].sum(), again.total.sum(), rtol=0.01)


def test_decoders_are_judged_on_so_many_tokens_and_fitted_on_all_others(monkeypatch):
    ensemble, activations, cluster, _ = planted(twins=False)
    member = torch.zeros(1, 16, dtype=torch.bool)
    member[0, :3] = True
    name = ("band", "stable")
    whole = ablation.reselected(ensemble, activations, cluster, member | True, {name: member})
    monkeypatch.setattr(removal, "JUDGED", 500)
    few = ablation.reselected(ensemble, activations, cluster, member | True, {name: member})
    assert len(whole.total) == 200
    assert len(few.total) == 50  # the first of the clusters that judge, with ten tokens each
    for part, of_whole in ((few.total, whole.total), (few.removed[name][0], whole.removed[name][0])):
        np.testing.assert_allclose(part, of_whole[:50], rtol=1e-5)


def bands(seeds: int = 12):
    """A stability of 40 features in each of 12 seeds: 16 all seeds share, 24 of each one's own."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(16, 200, generator=generator)
    return stability(torch.stack([torch.cat([shared, torch.randn(24, 200, generator=generator)]) for _ in range(seeds)]))


def test_controls_have_the_size_the_energy_and_the_frequency_of_their_band():
    found, generator = bands(), torch.Generator().manual_seed(3)
    energy, firings = torch.randint(1, 5, (2, 12, 40), generator=generator).float()  # so that many are exactly alike
    sets = ablation.sets_of(found, energy, firings)
    assert sets.members["band", "stable"].sum() == 12 * 16
    for band in ("stable", "unstable"):
        inside, random = sets.members["band", band], sets.members["random", band]
        paired, matched = sets.members["paired", band], sets.members["matched", band]
        assert torch.equal(inside.sum(1), random.sum(1))
        assert torch.equal(paired.sum(1), matched.sum(1))
        assert not (paired & ~inside).any()
        assert not (matched & inside).any()
        for seed in range(12):
            spread = CALIPER * energy[seed].log().double().std(correction=0).item()
            apart = energy[seed].log()[paired[seed]].mean() - energy[seed].log()[matched[seed]].mean()
            assert abs(apart.item()) <= spread
    assert sets.members["paired", "intermediate"].sum() == 0
    for order in ORDERS:
        sizes = [int(sets.members[f"by {order}", f"{share:g}"].sum()) for share in SHARES]
        assert sizes == [CURVE_SEEDS * round(share * 40) for share in SHARES]
    assert torch.equal(
        sets.members["by stability", "0.25"] & ~sets.members["band", "stable"][:CURVE_SEEDS],
        torch.zeros(CURVE_SEEDS, 40, dtype=torch.bool),
    )


def test_random_controls_are_drawn_from_all_live_features_alike():
    generator = torch.Generator().manual_seed(5)
    alive = torch.rand(12, 40, generator=generator) < 0.8
    found, (energy, firings) = bands(), torch.rand(2, 12, 40, generator=generator).exp()
    found = replace(found, alive=alive)
    members = ablation.sets_of(found, energy, firings, curves=False).members
    for band in ("stable", "unstable"):
        inside, random = members["band", band], members["random", band]
        assert torch.equal(random.sum(1), inside.sum(1))
        assert not (random & ~alive).any()
        # A live feature is drawn with the same probability wherever it stands, in the band or out of it.
        chance = (inside.sum(1) / alive.sum(1)).mean().item()
        for place in (torch.arange(40) < 16, torch.arange(40) >= 16):
            drawn = (random & place).sum() / (alive & place).sum()
            assert drawn.item() == pytest.approx(chance, abs=0.12)  # 3 standard deviations


def test_features_that_do_not_fire_on_the_tokens_at_hand_do_not_loosen_matches():
    found, generator = bands(), torch.Generator().manual_seed(4)
    energy, firings = torch.randint(1, 5, (2, 12, 40), generator=generator).float()  # so that many are exactly alike
    silent = torch.zeros(12, 40, dtype=torch.bool)
    silent[:, [3, 20, 35]] = True
    sets = ablation.sets_of(found, energy.masked_fill(silent, 0), firings.masked_fill(silent, 0))
    for seed in range(12):
        fires = ~silent[seed]
        for band in ("stable", "unstable"):
            paired, matched = (sets.members[role, band][seed] for role in ("paired", "matched"))
            assert paired.any()
            assert not (silent[seed] & (paired | matched)).any()
            for of in (energy[seed].log(), firings[seed].log()):
                caliper = CALIPER * of[fires].std(correction=0)
                assert (of[paired].sort().values - of[matched].sort().values).abs().max() <= caliper + 1e-6


def test_translation_tells_what_became_of_planted_features():
    rng = np.random.default_rng(0)
    tokens = 20_000

    def firing(share: float) -> np.ndarray:
        return (rng.random(tokens) < share) * rng.uniform(1, 2, tokens)

    same, first, second, third, part, gone, rare = (firing(share) for share in (0.02, 0.02, 0.02, 0.02, 0.01, 0.02, 0.001))
    broad = np.where(part > 0, rng.uniform(0.1, 6, tokens), (rng.random(tokens) < 0.1) * rng.uniform(0.1, 6, tokens))
    features = sparse.csr_array(np.stack([2 * same, first + second + third, part, gone, rare], 1).astype(np.float32))
    latents = np.stack([firing(0.05) for _ in range(6)] + [same, first, second, third, broad], 1).astype(np.float32)
    fitted = np.arange(tokens) % 2 == 0
    found = ablation.translate(features, sparse.csr_array(latents), fitted)
    assert [FATES[fate] for fate in found.fate] == ["rotated", "split", "merged", "missing", "too rare"]
    # One latent: least squares on the one that correlates most, scored on the other half.
    dense = features.toarray()
    slope, offset = np.polyfit(latents[fitted, 6], dense[fitted, 0], 1)
    assert found.explained[0, 0] == pytest.approx(1, abs=1e-4)
    best = np.argmax([abs(np.corrcoef(latents[fitted, j], dense[fitted, 1])[0, 1]) for j in range(11)])
    slope, offset = np.polyfit(latents[fitted, best], dense[fitted, 1], 1)
    left = dense[~fitted, 1] - slope * latents[~fitted, best] - offset
    assert found.explained[1, 0] == pytest.approx(1 - left.var() / dense[~fitted, 1].var(), abs=0.01)
    shuffled = rng.permutation(11)
    moved = ablation.translate(features, sparse.csr_array(latents[:, shuffled]), fitted)
    np.testing.assert_allclose(found.explained, moved.explained, atol=1e-9)


def test_translations_name_the_seed_and_not_its_place(site):
    ensemble = replace(random_ensemble("topk", site.activations, seeds=3), seeds=[3, 5, 9])
    member = (torch.arange(D_SAE) < 4).expand(3, 3, D_SAE)
    table = ablation.translate_to_next(Encoded.of(ensemble, site.activations), site.cluster, {"stable": member})
    assert table.seed.tolist() == [seed for seed in (3, 5, 9) for _ in range(4)]
    assert table.feature.tolist() == 3 * [0, 1, 2, 3]


def test_an_intervention_may_have_any_name(site):
    """`clean` is no name of the summary's own."""

    def edits(x):
        yield "clean", torch.zeros_like(x)
        yield "zero", torch.zeros_like(x)

    found = intervene(site.reading, edits)
    assert np.array_equal(found.nats["clean"], found.nats["zero"])
    assert found.nats["clean"].sum() != found.clean.sum()


def test_features_translated_a_few_at_a_time_are_those_of_a_regression_on_dense_codes(monkeypatch):
    rng = np.random.default_rng(1)
    latents = (rng.random((600, 30)) * (rng.random((600, 30)) < 0.2)).astype(np.float32)
    features = latents @ (rng.random((30, 11)) * (rng.random((30, 11)) < 0.1)).astype(np.float32)
    features += (rng.random((600, 11)) * (rng.random((600, 11)) < 0.1)).astype(np.float32)
    fitted = np.arange(600) % 2 == 0
    whole = ablation.translate(sparse.csr_array(features), sparse.csr_array(latents), fitted)
    monkeypatch.setattr("sae_stability.ablation.translation.CELLS", 100)  # three features at a time
    chunked = ablation.translate(sparse.csr_array(features), sparse.csr_array(latents), fitted)
    for name, array in vars(whole).items():
        np.testing.assert_array_equal(getattr(chunked, name), array, name)
    # Matching pursuit by hand: each latent is the one that correlates most with what is left, all are fitted again.
    half, mean = latents[fitted].astype(float), latents[fitted].mean(0)
    for feature in range(11):
        target = features[fitted, feature].astype(float) - features[fitted, feature].mean()
        chosen, left = [], target
        for _ in range(8):
            gain = np.abs((half - mean).T @ left) / half.std(0)
            gain[chosen] = -1
            chosen.append(int(gain.argmax()))
            fit = np.linalg.lstsq((half - mean)[:, chosen], target, rcond=None)[0]
            left = target - (half - mean)[:, chosen] @ fit
        rest = (features[~fitted, feature] - latents[~fitted][:, chosen] @ fit).var()
        assert whole.explained[feature, -1] == pytest.approx(1 - rest / features[~fitted, feature].var(), abs=1e-3)


@pytest.mark.parametrize(
    ("firings", "explained", "contained", "ratio", "fate"),
    [
        (RAREST - 1, (0.9, 0.9), 1.0, 5.0, "too rare"),
        (RAREST, (PREDICTED, 0.9), 1.0, 5.0, "rotated"),
        (RAREST, (PREDICTED - 0.01, PREDICTED), 1.0, 5.0, "split"),
        (RAREST, (0.1, PREDICTED - 0.01), CONTAINED, BROADER, "merged"),
        (RAREST, (0.1, 0.2), CONTAINED - 0.01, 5.0, "missing"),  # most of its firings are elsewhere
        (RAREST, (0.1, 0.2), 1.0, BROADER - 0.01, "missing"),  # the latent is hardly broader than the feature
    ],
)
def test_fates_follow_the_rule_up_to_its_borders(firings, explained, contained, ratio, fate):
    curve = np.array([[explained[0], explained[0], explained[1], explained[1]]])
    found = ablation.Translation(curve, np.array([contained]), np.array([float(ratio)]), np.array([firings]))
    assert FATES[found.fate[0]] == fate


def test_a_transplant_between_equal_seeds_changes_nothing(site):
    ensemble = random_ensemble("topk", site.activations, seeds=1)
    twice = Ensemble.joined([ensemble, ensemble])
    member = (torch.arange(D_SAE) % 2 == 0).expand(2, 2, D_SAE)
    mean = ensemble.encode(site.activations.data).mean(1).expand(2, D_SAE)
    found = ablation.transplant(site.reading, twice, member, mean)
    np.testing.assert_allclose(found.nats["transplanted", 0], found.clean, atol=1e-3)
    assert found.divergence["removed", 0].sum() > 10 * abs(found.divergence["transplanted", 0]).sum()
    assert found.divergence["averaged", 0].sum() < found.divergence["removed", 0].sum()
