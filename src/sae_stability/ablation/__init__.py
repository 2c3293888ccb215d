"""What features do: how much reconstruction and prediction lose without them (PAPER, claims C2 to C4).

impact       the effect of each feature alone
impacts      what features weigh by it, and how much of that reappears in another seed
removal      the effect of sets of features, by several readings
controls     the sets: bands, and what they are compared with
estimates    what sets carry, with intervals over seeds and text
translation  one seed's unstable features in the words of another seed
"""

from sae_stability.ablation.controls import Sets, sets_of
from sae_stability.ablation.effects import Effects, measure, sample
from sae_stability.ablation.estimates import Estimates
from sae_stability.ablation.impact import (
    Impact,
    PredictionImpact,
    impact_on_prediction,
    impact_on_reconstruction,
    true_impact_on_prediction,
)
from sae_stability.ablation.impacts import Impacts, Reappearing, Weight, measure_impacts
from sae_stability.ablation.removal import on_prediction, on_reconstruction, reselected
from sae_stability.ablation.translation import Translation, translate, translate_to_next, transplant

__all__ = [
    "Effects",
    "Estimates",
    "Impact",
    "Impacts",
    "PredictionImpact",
    "Reappearing",
    "Sets",
    "Translation",
    "Weight",
    "impact_on_prediction",
    "impact_on_reconstruction",
    "measure",
    "measure_impacts",
    "on_prediction",
    "on_reconstruction",
    "reselected",
    "sample",
    "sets_of",
    "translate",
    "translate_to_next",
    "transplant",
    "true_impact_on_prediction",
]
