"""The dense training step: every variant as its paper writes it, with gradients by autograd and a loop that reads top to bottom.

It is slow, and three things need it: a reader who wants to see all of a training in one place, the tests that hold the fast
engine to it, and a new variant, which starts from `Dense` with nothing but its loss and gets its gradients written by hand once it
is worth it. AuxK, clipping and the search for a penalty are left to `training/`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_stability.saes.batchtopk import BatchTopK, BatchTopKParameters
from sae_stability.saes.gated import Gated, GatedParameters
from sae_stability.saes.jumprelu import BANDWIDTH, JumpReLU, JumpReLUParameters
from sae_stability.saes.matryoshka import Matryoshka, sizes
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.relu import ReLU
from sae_stability.saes.sparse import Codes
from sae_stability.saes.topk import TopK
from sae_stability.saes.variant import Variant


class Forward(NamedTuple):
    """What a forward pass gives; the loss is a mean over tokens."""

    z: Float[Tensor, "token d_sae"]
    x_hat: Float[Tensor, "token d_in"]
    loss: Float[Tensor, ""]


class Dense(Variant):
    """A variant that is given by its loss. A subclass writes `forward`; `training/` takes it like any other variant."""

    steady = False  # even where the fast variant is: codes are read off dense ones

    @abstractmethod
    def forward(self, sae: Parameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        """Codes, reconstruction and loss; `training` tells a batch that is trained on from inference."""

    def encode(self, sae: Parameters, x: Float[Tensor, "token d_in"]) -> Codes:
        return Codes.from_dense(self.forward(sae, x, training=False).z)

    def gradients(
        self, sae: Parameters, gradient: Parameters, x: Float[Tensor, "token d_in"]
    ) -> tuple[Float[Tensor, "token d_in"], Codes]:
        leaves = type(sae)(*(tensor.detach().requires_grad_() for tensor in sae))
        z, x_hat, loss = self.forward(leaves, x, training=True)
        for tensor, slope in zip(gradient, torch.autograd.grad(loss, list(leaves), materialize_grads=True), strict=True):
            tensor.copy_(slope)
        return (x_hat - x).detach(), Codes.from_dense(z.detach())


class DenseReLU(Dense, ReLU):
    def forward(self, sae: Parameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        z = F.relu(pre_activations(sae, x))
        x_hat = z @ sae.W_dec + sae.b_dec
        penalty = self.coefficient * (z * sae.W_dec.norm(dim=1)).sum(1).mean()
        return Forward(z, x_hat, squared_error(x, x_hat) + penalty)


class DenseTopK(Dense, TopK):
    def forward(self, sae: Parameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        pre = pre_activations(sae, x)
        z = torch.zeros_like(pre).scatter(1, pre.topk(self.k, dim=1).indices, 1.0) * F.relu(pre)
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat))


class DenseBatchTopK(Dense, BatchTopK):
    def forward(self, sae: BatchTopKParameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        pre = pre_activations(sae, x)
        largest = pre.flatten().topk(self.k * len(x)).indices
        fires = torch.zeros_like(pre).flatten().scatter(0, largest, 1.0).view_as(pre) if training else pre > sae.threshold
        z = fires * F.relu(pre)
        x_hat = z @ sae.W_dec + sae.b_dec
        return Forward(z, x_hat, squared_error(x, x_hat))


class DenseMatryoshka(DenseBatchTopK, Matryoshka):
    def forward(self, sae: BatchTopKParameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        z, x_hat, _ = super().forward(sae, x, training)
        nested = [z[:, :size] @ sae.W_dec[:size] + sae.b_dec for size in sizes(len(sae.W_dec))]
        return Forward(z, x_hat, torch.stack([squared_error(x, part) for part in nested]).sum())


class DenseGated(Dense, Gated):
    def forward(self, sae: GatedParameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        gate = pre_activations(sae, x)
        magnitude = sae.r_mag.exp() * (gate - sae.b_enc) + sae.b_mag
        z = (gate > 0) * F.relu(magnitude)
        x_hat = z @ sae.W_dec + sae.b_dec
        by_gate = F.relu(gate) @ sae.W_dec.detach() + sae.b_dec.detach()
        penalty = self.coefficient * F.relu(gate).sum(1).mean()
        return Forward(z, x_hat, squared_error(x, x_hat) + penalty + squared_error(x, by_gate))


class DenseJumpReLU(Dense, JumpReLU):
    def forward(self, sae: JumpReLUParameters, x: Float[Tensor, "token d_in"], training: bool) -> Forward:
        pre = pre_activations(sae, x)
        theta = sae.log_threshold.exp()
        step = Step.apply(pre, theta)
        z = pre * (pre > theta) + theta.detach() * (step - step.detach())  # the second term is zero, and has the gradient of eq. 11
        x_hat = z @ sae.W_dec + sae.b_dec
        penalty = self.coefficient * step.sum(1).mean()
        return Forward(z, x_hat, squared_error(x, x_hat) + penalty)


class Step(torch.autograd.Function):
    """H(pre - theta), with the straight-through gradient of JumpReLU's paper for theta (eq. 12)."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[None, Tensor]:
        pre, theta = ctx.saved_tensors
        window = ((pre - theta).abs() < BANDWIDTH / 2) / BANDWIDTH
        return None, -(upstream * window).sum(0)


DENSE: dict[str, type[Dense]] = {
    "relu": DenseReLU,
    "topk": DenseTopK,
    "batchtopk": DenseBatchTopK,
    "matryoshka": DenseMatryoshka,
    "gated": DenseGated,
    "jumprelu": DenseJumpReLU,
}


def pre_activations(sae: Parameters, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
    return (x - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc


def squared_error(x: Float[Tensor, "token d_in"], x_hat: Float[Tensor, "token d_in"]) -> Float[Tensor, ""]:
    return (x - x_hat).square().sum(1).mean()


def train(
    method: Dense,
    batches: Sequence[Float[Tensor, "batch d_in"]],
    d_sae: int,
    generator: torch.Generator,
    rate: float = 3e-3,
    warmup: float = 0.02,
    decay: float = 0.3,
) -> Parameters:
    """Train one SAE, one step of Adam a batch of normalised activations.

    The rate rises from zero over the share `warmup` of the steps, stays, and falls to zero over the last `decay`.
    """
    sae = method.initialise(batches[0].shape[1], d_sae, generator)
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in sae], lr=rate)
    for step, x in enumerate(batches):
        progress = step / len(batches)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (progress + 1e-3) / warmup, (1 - progress) / decay)

        optimizer.zero_grad()
        method.forward(sae, x, training=True).loss.backward()
        W_dec, slope = sae.W_dec.data, sae.W_dec.grad
        if method.unit_decoder:  # a direction has no length to learn
            slope -= (slope * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        if method.unit_decoder:
            W_dec.copy_(F.normalize(W_dec, dim=1))

    sae = type(sae)(*(tensor.detach() for tensor in sae))
    method.finish(sae, batches[-16:])
    return sae
