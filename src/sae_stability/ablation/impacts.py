"""What was found of single features, each removed alone: what they weigh, and how much of that weight reappears.

A pair statistic: what the features of a seed that reappear in another one hold of a weight, over all pairs of seeds. It does not
depend on the number of seeds, and no band cuts it (PAPER, Definitions).
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_stability.ablation.controls import following
from sae_stability.ablation.impact import impact_on_prediction, impact_on_reconstruction
from sae_stability.evaluation import Encoded
from sae_stability.language.interventions import Reading
from sae_stability.matching import Stability
from sae_stability.statistics import Interval, over_pairs, resampled

Weight = Literal["features", "energy", "reconstruction", "prediction"]
"""What a feature counts for: one, its energy, what its removal alone does to the squared error, and to the cross-entropy."""


@dataclass(frozen=True)
class Impacts:
    """Sums over held-out tokens, of each feature of each seed."""

    firings: Float[Tensor, "seed d_sae"]
    """Tokens on which it fires, of those on which reconstruction is judged."""
    activation: Float[Tensor, "seed d_sae"]
    """Its activation, summed over them."""
    energy: Float[Tensor, "seed d_sae"]
    reconstruction: Float[Tensor, "seed d_sae"]
    """Growth of the squared error where it is removed."""
    returning: Float[Tensor, "seed cluster"]
    """The same, summed over the features that reappear in the next seed, by the cluster of the token."""
    everything: Float[Tensor, "seed cluster"]
    """And over all of them."""
    first_order: Float[Tensor, "seed d_sae"]
    """On prediction, in nats a token: gradient x activation."""
    second_order: Float[Tensor, "seed d_sae"]
    """The next term of the same, never negative."""
    by_context: Float[Tensor, "seed context d_sae"]
    """Both, in nats, by context."""
    rows: Int[Tensor, ""]
    """Tokens on which reconstruction is judged."""

    @property
    def on_prediction(self) -> Float[Tensor, "seed d_sae"]:
        """The impact of each feature alone on the cross-entropy, to second order, in nats a token."""
        return self.first_order + self.second_order

    def alone(self, member: Bool[Tensor, "seed d_sae"]) -> Float[np.ndarray, "seed context"]:
        """The impacts on prediction of a set's features, each removed alone, in nats, by context."""
        return np.stack([own[:, chosen].double().sum(1).numpy() for own, chosen in zip(self.by_context, member, strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file; `Impacts(**tensors)` reads it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def measure_impacts(held_out: Encoded, stability: Stability, cluster: Int[np.ndarray, "token"], site: Reading) -> Impacts:
    """Remove every feature of every seed alone: by a pass over `held_out`, whose rows come from `cluster`, and two at `site`."""
    on_error = impact_on_reconstruction(held_out, cluster, {"returning": following(stability), "everything": stability.alive})
    on_loss = impact_on_prediction(site, held_out.ensemble)
    return Impacts(
        on_error.firings, on_error.activation, on_error.energy, on_error.reconstruction, **on_error.of_sets,
        **vars(on_loss), rows=torch.tensor(len(held_out.activations)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reappearing:
    """How much of what single features weigh reappears in another seed."""

    impacts: Impacts
    stability: Stability

    def weight(self, of: Weight) -> Float[np.ndarray, "seed d_sae"]:
        """What each live feature counts for."""
        impacts = self.impacts
        weights = {"energy": impacts.energy, "reconstruction": impacts.reconstruction, "prediction": impacts.on_prediction}
        return np.where(self.stability.alive, weights[of].numpy() if of in weights else 1.0, 0.0)

    @property
    def frequency(self) -> Float[np.ndarray, "seed d_sae"]:
        """The share of the tokens on which each feature fires; half a token's where it fires on none."""
        return np.maximum(self.impacts.firings.numpy(), 0.5) / int(self.impacts.rows)

    def share(self, of: Weight) -> Interval:
        """The share of features, of energy or of the impacts of single features that reappears in another seed, over all pairs."""
        return over_pairs(self.stability.weighted(self.weight(of)), self._drawn(of)).within(0, 1)

    def _drawn(self, of: Weight) -> Float[np.ndarray, "sample"] | None:
        """The same of the next seed alone on resampled text; features are counted whatever the text."""
        if of == "features":
            return None
        if of == "prediction":
            part, whole = (self.impacts.alone(member) for member in (following(self.stability), self.stability.alive))
        else:  # what a set writes is nearly what its removal costs
            part, whole = self.impacts.returning.numpy(), self.impacts.everything.numpy()
        weights = resampled(part.shape[1])
        return ((weights @ part.T) / (weights @ whole.T)).mean(1)
