"""Training that goes on from weights that are there."""

import torch

from sae_stability.language.activations import Activations
from sae_stability.saes import variant
from sae_stability.study import Recipe
from sae_stability.training import train
from sae_stability.training.finetuning import finetune
from sae_stability.training.loop import generator

RECIPE = Recipe(model="none", hook_name="blocks.0.hook_resid_post", d_sae=24, k=3, tokens=4096, batch=256, encoder="float32")


def activations() -> Activations:
    generator = torch.Generator().manual_seed(0)
    return Activations.of(torch.randn(RECIPE.tokens, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 1)


def test_from_the_initial_weights_it_is_the_training():
    x = activations()
    trained = train(RECIPE, x, [3, 5])
    begun = [variant("topk")(RECIPE.k).initialise(16, RECIPE.d_sae, generator(RECIPE, seed)) for seed in (3, 5)]
    start = trained.with_parameters(**{name: torch.stack([getattr(each, name) for each in begun]) for name in begun[0]._asdict()})
    again = finetune(start, RECIPE, x)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters, trained.parameters, strict=True))


def test_where_only_directions_move_codes_stay():
    x = activations()
    trained = train(RECIPE, x, [3])
    tuned = finetune(trained, RECIPE, x, decoder_alone=True)
    before, after = trained.parameters._asdict(), tuned.parameters._asdict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"W_dec"}


def test_tokens_that_fill_no_batch_are_one():
    trained = train(RECIPE, activations(), [3])
    few = RECIPE.model_copy(update={"tokens": 100})
    tuned = finetune(trained, few, activations().first(100))
    assert not torch.equal(tuned.W_dec, trained.W_dec)


def test_it_keeps_the_units_of_what_it_starts_from_and_leaves_that_alone():
    x, other = activations(), Activations.of(10 * activations().data + 3)
    trained = train(RECIPE, x, [3])
    before = trained.W_dec.clone()
    tuned = finetune(trained, RECIPE.model_copy(update={"rate": 1e-6}), other)
    assert torch.equal(trained.W_dec, before)
    assert torch.equal(tuned.mean, trained.mean)
    assert tuned.scale == trained.scale
    assert torch.allclose(tuned.W_dec, before, atol=1e-3)  # at a rate of nearly nothing
    assert not torch.equal(tuned.W_dec, before)
