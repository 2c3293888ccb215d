import numpy as np
import pytest
import torch
from scipy import sparse

from helpers import drawn
from sae_stability import portraits
from sae_stability.language import models
from sae_stability.language.corpus import Contexts

WIDTH = 40


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    """Twelve contexts of six clusters; the first position of each is no text, and neither is one in the middle of the second."""
    tokens, is_text = np.arange(12 * WIDTH).reshape(12, WIDTH), np.ones((12, WIDTH), dtype=bool)
    is_text[:, 0], is_text[1, 20] = False, False
    return Contexts(tokens, np.repeat(np.arange(12) // 2, WIDTH).reshape(12, WIDTH), is_text)


@pytest.fixture(scope="module")
def codes(contexts) -> sparse.csc_array:
    """Features that fire on a tenth of the tokens, one that fires once, and one that never does."""
    rows = int(contexts.is_text.sum())
    dense = drawn(rows, 6).clamp(min=1.2).sub(1.2).numpy()
    dense[:, 4:] = 0
    dense[7, 4] = 2.5
    return sparse.csc_array(dense)


def test_windows_are_those_of_a_plain_search(codes, contexts):
    found = portraits.windows(codes, contexts)
    context, position = np.nonzero(contexts.is_text)
    cluster, dense = contexts.cluster[context, position], codes.toarray()
    for feature in range(codes.shape[1]):
        windows = found[found["feature"] == feature]
        top = windows[windows["rank"] > 0].set_index("rank").sort_index()
        strongest = [
            max(np.flatnonzero(cluster == one), key=lambda row, of=feature: dense[row, of])
            for one in np.unique(cluster)
            if dense[cluster == one, feature].any()
        ]
        strongest = sorted(strongest, key=lambda row, of=feature: -dense[row, of])[: portraits.TOP]
        assert top["peak"].tolist() == strongest
        at_random = windows.loc[windows["rank"] == 0, "peak"]
        assert (dense[at_random, feature] > 0).all()
        assert not set(at_random) & set(strongest)
        assert len(at_random) == min(portraits.AT_RANDOM, (dense[:, feature] > 0).sum() - len(strongest))
        for window in windows.itertuples():
            inside = np.flatnonzero(
                (context == context[window.peak]) & (abs(np.arange(len(context)) - window.peak) <= portraits.REACH)
            )
            assert window.first == inside[0]
            assert np.array_equal(np.array(window.activations, dtype=dense.dtype), dense[inside, feature])


def test_features_in_another_order_have_the_same_strongest_windows(codes, contexts):
    order = np.array([3, 0, 5, 1, 4, 2])
    plain, moved = (portraits.windows(each, contexts).query("rank > 0") for each in (codes, codes[:, order]))
    moved = moved.assign(feature=order[moved["feature"]]).sort_values(["feature", "rank"], ignore_index=True)
    assert moved.equals(plain.reset_index(drop=True))


def test_histograms_count_every_firing_once(codes):
    table = portraits.histograms(codes).set_index("feature")
    dense = codes.toarray()
    assert table["strongest"].tolist() == pytest.approx(dense.max(0).tolist())
    assert [sum(counts) for counts in table["histogram"]] == (dense > 0).sum(0).tolist()
    assert table.loc[4, "histogram"] == [0] * (portraits.BINS - 1) + [1]
    half = dense[:, 0].max() / 2
    assert sum(table.loc[0, "histogram"][: portraits.BINS // 2]) == ((dense[:, 0] > 0) & (dense[:, 0] < half)).sum()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logit_effects_are_those_of_the_formula(model_folders, name, monkeypatch):
    monkeypatch.setattr(portraits, "BLOCK", 3)
    bridge, directions = models.load(str(model_folders[name])), drawn(7, 32)
    with torch.no_grad():  # an untrained norm changes nothing, and a bias is no effect of a direction
        for number, parameter in enumerate(bridge.ln_final.parameters()):
            parameter.copy_(drawn(32, seed=number))
    found = portraits.logit_effects(bridge, directions).set_index("feature")
    weights, norm = models.load_weights(str(model_folders[name]), torch.float32), next(bridge.ln_final.parameters())
    x = directions.double()
    if name == "gpt2":
        x = x - x.mean(1, keepdim=True)
    x = x / x.square().mean(1, keepdim=True).sqrt() * norm.double()
    effects = x @ weights.lm_head.weight.double().T
    effects = effects - effects.mean(1, keepdim=True)
    assert len(found) == 7
    for feature, effect in enumerate(effects):
        for column, sign in (("raised", 1), ("lowered", -1)):
            values = sign * (sign * effect).topk(portraits.LIKELIER).values
            assert found.loc[feature, f"{column}_by"] == pytest.approx(values.tolist(), abs=1e-4)
            assert effect[found.loc[feature, column]].tolist() == pytest.approx(values.tolist(), abs=1e-4)
