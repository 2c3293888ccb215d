"""What a model predicts where the activations at one of its sites are changed: losses and divergences, whoever changes them."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability.language.corpus import Contexts
from sae_stability.language.models import device_of
from sae_stability.language.site import CHUNK, Site

BATCH = 16  # contexts a forward pass

Edits = Callable[[Float[Tensor, "token d_in"]], Iterator[tuple[Hashable, Float[Tensor, "token d_in"]]]]
"""Takes the activations of text tokens and yields what stands in their place, by name."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A site of a model, and the held-out text that is read there."""

    bridge: object
    """The model, as `models.load` gives it."""
    hook_name: str
    contexts: Contexts
    """All held-out text."""
    tokens: int
    """About how many text tokens of it are read."""

    def spread(self) -> Contexts:
        """The contexts that are read: spread evenly over all of the text, so that they meet many documents."""
        return self.contexts.spread(self.tokens)


@dataclass(frozen=True)
class Predictions:
    """What the model predicts under interventions at one site, summed over the tokens of each cluster."""

    clean: Float[np.ndarray, "cluster"]
    """Cross-entropy in nats without an intervention."""
    nats: dict[Hashable, Float[np.ndarray, "cluster"]]
    """Cross-entropy under each intervention."""
    divergence: dict[Hashable, Float[np.ndarray, "cluster"]]
    """KL divergence in nats of the prediction under each intervention from the clean one."""
    tokens: Int[np.ndarray, "cluster"]


def intervene(reading: Reading, edits: Edits, described: str = "interventions") -> Predictions:
    """Let the model predict held-out tokens, with the activations at a site as they are and as `edits` makes them.

    BOS and separators keep their activations, and are no targets. Wherever the model computes, `edits` works on the CPU; what it
    yields is cast to the model's dtype. Losses are computed in float32.
    """
    contexts = reading.spread()
    kinds, cluster = np.unique(contexts.cluster, return_inverse=True)
    cluster = cluster.reshape(contexts.cluster.shape)
    nats: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(len(kinds)))
    divergence: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(len(kinds)))
    unchanged, scored = np.zeros(len(kinds)), np.zeros(len(kinds), dtype=int)
    site, device = Site(reading.bridge, reading.hook_name), device_of(reading.bridge)
    with torch.inference_mode():
        for start in tqdm(range(0, len(contexts.tokens), BATCH), described, unit="batch", disable=None):
            rows = slice(start, start + BATCH)
            ids = torch.from_numpy(contexts.tokens[rows]).long().to(device)
            text = torch.from_numpy(contexts.is_text[rows]).to(device)
            before_text = F.pad(text[:, 1:], (0, 1))  # positions that a text token follows
            targets = ids[:, 1:][text[:, 1:]]
            clusters = cluster[rows][:, 1:][contexts.is_text[rows][:, 1:]]
            scored += np.bincount(clusters, minlength=len(kinds))
            value, logits = site.read(ids)
            logits = logits[before_text].float()
            likely = logits.softmax(1)
            clean, expected = _cross_entropies(logits.split(CHUNK), likely, targets)
            unchanged += np.bincount(clusters, clean, len(kinds))
            for name, edited in edits(value[text].cpu()):
                changed = site.predict(value.index_put((text,), edited.to(device, value.dtype)), before_text)
                true, against = _cross_entropies(changed, likely, targets)
                nats[name] += np.bincount(clusters, true, len(kinds))
                divergence[name] += np.bincount(clusters, against - expected, len(kinds))
    return Predictions(unchanged, dict(nats), dict(divergence), scored)


def _cross_entropies(
    logits: Iterable[Float[Tensor, "_ vocabulary"]], likely: Float[Tensor, "target vocabulary"], targets: Int[Tensor, "target"]
) -> tuple[Float[np.ndarray, "target"], Float[np.ndarray, "target"]]:
    """In nats: of each target, and in the mean over tokens that are as likely as `likely` says; `logits` come in chunks.

    The latter less that of `likely` itself is the KL divergence.
    """
    true, mean = [], []
    for part, expected, target in zip(logits, likely.split(CHUNK), targets.split(CHUNK), strict=True):
        part = part.float()
        normaliser = part.logsumexp(1)
        true.append(normaliser - part.gather(1, target[:, None])[:, 0])
        mean.append(normaliser - torch.bmm(expected[:, None], part[:, :, None])[:, 0, 0])
    return torch.cat(true).double().cpu().numpy(), torch.cat(mean).double().cpu().numpy()
