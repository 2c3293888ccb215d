import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae_stability.errors import UserError
from sae_stability.experiments import texts
from sae_stability.language import models, pretraining
from sae_stability.language.corpus import EMBEDDED_SHA256
from sae_stability.language.pretraining import BATCH, CONTEXT, RECIPES, Recipe

TINY = Recipe(layers=1, d_model=16, heads=2, epochs=2, rate=1e-3)


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "RECORD", 2)
    tokens = np.random.default_rng(0).integers(1, 50, (5 * BATCH, CONTEXT)).astype(np.int32)
    undisturbed, curve = pretraining._fit(TINY, tokens, "cpu", tmp_path / "a.safetensors", "corpus", every=0)

    class Killed(BaseException):
        pass

    rows, calls = pretraining._rows, iter(range(100))

    def dies(*arguments):
        if next(calls) == 7:
            raise Killed
        return rows(*arguments)

    monkeypatch.setattr(pretraining, "_rows", dies)
    with pytest.raises(Killed):
        pretraining._fit(TINY, tokens, "cpu", tmp_path / "b.safetensors", "corpus", every=0)
    monkeypatch.setattr(pretraining, "_rows", rows)
    resumed, resumed_curve = pretraining._fit(TINY, tokens, "cpu", tmp_path / "b.safetensors", "corpus", every=0)
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert curve == resumed_curve


def test_a_checkpoint_of_another_recipe_or_corpus_is_not_resumed(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 50, (5 * BATCH, CONTEXT)).astype(np.int32)
    short, path = replace(TINY, epochs=0.5), tmp_path / "c.safetensors"
    alone, _ = pretraining._fit(TINY, tokens, "cpu", tmp_path / "alone.safetensors", "corpus", every=0)
    pretraining._fit(short, tokens, "cpu", path, "corpus", every=0)
    after, curve = pretraining._fit(TINY, tokens, "cpu", path, "corpus", every=0)
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), after.parameters(), strict=True))
    assert curve[-1]["tokens"] == 2 * tokens.size


def test_every_epoch_reads_every_context_once():
    contexts = 3 * BATCH + 5
    seen = np.concatenate([pretraining._rows(step, contexts, seed=1) for step in range(8)])
    assert np.array_equal(np.sort(seen[:contexts]), np.arange(contexts))
    assert np.array_equal(np.sort(seen[contexts : 2 * contexts]), np.arange(contexts))


def test_counted_baselines_agree_with_a_loop():
    generator = np.random.default_rng(0)
    train, held_out = (generator.integers(0, 9, (20, 12)).astype(np.int32) for _ in range(2))
    found = pretraining._counted_baselines(train, held_out)
    ones = [sum((train[:, 1:] == token).sum() for _ in "x") for token in range(pretraining.VOCABULARY)]
    unigram = [(count + 1) / (train[:, 1:].size + pretraining.VOCABULARY) for count in ones]
    nats = []
    for row in held_out:
        for before, after in itertools.pairwise(row):
            followers = [b for line in train for a, b in itertools.pairwise(line) if a == before]
            kinds = len(set(followers))
            nats.append(-math.log((followers.count(after) + kinds * unigram[after]) / (len(followers) + kinds)))
    assert found["bigram"] == pytest.approx(np.mean(nats))
    assert found["unigram"] == pytest.approx(np.mean([-math.log(unigram[after]) for after in held_out[:, 1:].ravel()]))


@pytest.mark.parametrize(("name", "most"), [("docstrings-2l", 3.7), ("docstrings-4l", 3.2)])
def test_shipped_models_are_as_good_as_their_cards_say(quick, name, most):
    folder = pretraining.places.root() / "models" / name
    told = json.loads((folder / "training.json").read_text())
    nats = told["nats_per_token"]
    assert nats["model"] <= most < nats["bigram"] < nats["unigram"]
    recipe = told["recipe"]
    assert Recipe(**recipe) == RECIPES[name]
    assert f"| model | {nats['model']:.3f} |" in (folder / "README.md").read_text()

    if sys.version_info >= (3, 12):
        pytest.skip("numpy comes without some of the documents that the models were trained on")
    assert texts.facts(quick.main)["corpus_sha256"] == EMBEDDED_SHA256
    held_out = texts.contexts(quick.main, "evaluation").tokens[::40]  # both have the same tokenizer
    tokens = torch.from_numpy(held_out).long()
    bridge = models.load(name)
    with torch.inference_mode():
        logits = bridge(tokens)[:, :-1]
    measured = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert measured == pytest.approx(nats["model"], abs=0.1)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something already"):
        pretraining.train_model("docstrings-2l", tmp_path)
