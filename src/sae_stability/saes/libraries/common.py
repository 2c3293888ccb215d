"""What the files of several libraries ask for."""

from jaxtyping import Float
from torch import Tensor

from sae_stability.saes.batchtopk import BatchTopKParameters
from sae_stability.saes.jumprelu import JumpReLUParameters
from sae_stability.saes.parameters import Parameters

TRANSCODER = "a transcoder, whose decoder writes elsewhere than its encoder reads; give an SAE"
SMALLEST_THRESHOLD = 1e-30  # of a JumpReLU feature, whose logarithm is kept; one of zero or less is plain ReLU


def with_thresholds(sae: Parameters, threshold: Float[Tensor, "d_sae"]) -> JumpReLUParameters:
    """The same SAE, of JumpReLU."""
    return JumpReLUParameters(*sae, threshold.clamp(min=SMALLEST_THRESHOLD).log())


def with_one_threshold(sae: Parameters, threshold: Float[Tensor, ""]) -> BatchTopKParameters:
    """The same SAE, of BatchTopK."""
    return BatchTopKParameters(*sae, threshold.clamp(min=0))
