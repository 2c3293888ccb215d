"""The conclusions of the chapter on synthetic worlds hold on tokens that SAELens' own generator draws.

Unlike in our worlds, how many isolated features are active differs from token to token, and strengths are normal.
"""

from dataclasses import replace

import pytest
import torch
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary

from sae_stability.experiments.synthetic import LONGER, LOST, NEAR, SPANNED, TOLD
from sae_stability.statistics import jackknifed_mean
from sae_stability.synthetic import World, measure

TOKENS, SEEDS = 500_000, 4


class Generated(World):
    """A world whose tokens come from SAELens' feature dictionary and activation generator. Its blocks have no preferred directions,
    or one active feature."""

    def draw(self, tokens, generator):
        truth = self.truth
        both_ways = torch.cat(
            [truth.spaces.mT, -truth.spaces.mT], 1
        )  # of a normal vector, what is above 0 along each axis, and below
        in_blocks = both_ways if self.active is None else truth.in_blocks
        directions = torch.cat([truth.isolated, in_blocks.flatten(0, 1)])
        often = torch.ones(len(directions))
        often[: self.isolated] = self.isolated_active / self.isolated

        def one_block(activations):
            if not self.blocks:
                return activations
            inside = activations[:, self.isolated :].view(tokens, self.blocks, -1)
            if self.active is None:
                normal = torch.randn(tokens, self.blocks, self.r)
                inside = torch.cat([normal, -normal], 2).relu()
            else:
                inside = inside * torch.nn.functional.one_hot(torch.rand(inside.shape).argmax(2), inside.shape[2])
            block = torch.nn.functional.one_hot(torch.randint(self.blocks, (tokens,)), self.blocks)
            return torch.cat([activations[:, : self.isolated], (inside * block[:, :, None]).flatten(1)], 1)

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(generator.initial_seed())
            dictionary = FeatureDictionary(
                len(directions), self.d_in, initializer=lambda drawn: drawn.feature_vectors.copy_(directions)
            )
            drawn = ActivationGenerator(len(directions), often, std_firing_magnitudes=0.3, modify_activations=one_block)
            return dictionary(drawn.sample(tokens))


def test_isolated_features_are_found():
    assert measure(Generated(blocks=0, tokens=TOKENS), SEEDS)["found_isolated"] > 0.95


@pytest.mark.parametrize("r", [8, 12])
def test_blocks_without_preferred_directions_are_found_as_a_space_and_not_one_by_one(r):
    found = measure(Generated(r=r, tokens=TOKENS), 2 * SEEDS)
    assert found["found_in_blocks"] < LOST
    assert found["subspace"] > SPANNED
    assert abs(found["p_in_blocks"] - found["expected_p"]) < NEAR


def test_features_of_sparse_blocks_are_found_with_a_tight_budget_and_lost_with_slack():
    """On average over worlds, as the rule asks: single worlds lie on both sides of its bound."""
    tight = [Generated(r=r, active=1, tokens=LONGER * TOKENS, seed=seed) for r in (8, 12) for seed in range(10, 14)]
    slack = [replace(world, budget=(world.isolated_active + world.r) / world.l0) for world in tight[::4]]
    found, lost = (jackknifed_mean(measure(world, SEEDS)["found_in_blocks"] for world in worlds) for worlds in (tight, slack))
    print(f"tight {found:.3f}, slack {lost:.3f}")
    assert found.value > TOLD
    assert lost.value < 0.5
