"""How good SAEs are on held-out documents: explained variance, L0, firing frequencies, the model's loss when spliced in."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from sae_stability.language.activations import Activations
from sae_stability.language.corpus import Contexts
from sae_stability.language.models import device_of
from sae_stability.language.site import CHUNK, Site
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.sparse import Codes, Parameters
from sae_stability.statistics import Interval, bootstrap_ratio

ROWS = 8192  # tokens encoded at a time
CONTEXTS = 16  # contexts a forward pass
WINDOW = 10  # tokens shown on each side of a peak


@dataclass(frozen=True)
class Fit:
    """What each seed's SAE does on held-out activations."""

    firings: Int[Tensor, "seed d_sae"]
    """Tokens on which each feature fires; none: the feature is dead."""
    rows: int
    """Tokens measured."""
    residual: Float[np.ndarray, "seed document"]
    """Squared error summed over the tokens of each document."""
    total: Float[np.ndarray, "document"]
    """Squared distance from the mean activation summed over the tokens of each document."""

    @property
    def frequency(self) -> Float[Tensor, "seed d_sae"]:
        return self.firings / self.rows

    @property
    def l0(self) -> Float[Tensor, "seed"]:
        return self.firings.sum(1) / self.rows

    def explained_variance(self, seed: int) -> Interval:
        """Of the SAE at position `seed`; documents are resampled."""
        return bootstrap_ratio(self.residual[seed], self.total, lambda ratio: 1 - ratio)


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats, summed over the tokens of each document, under interventions at one site."""

    clean: Float[np.ndarray, "document"]
    zero: Float[np.ndarray, "document"]
    """With the site set to zero."""
    mean: Float[np.ndarray, "document"]
    """With the site set to its mean."""
    spliced: Float[np.ndarray, "seed document"]
    """With each seed's reconstruction in place of the site."""
    tokens: Int[np.ndarray, "document"]

    def per_token(self, sums: Float[np.ndarray, "document"]) -> Interval:
        return bootstrap_ratio(sums, self.tokens)

    def recovered(self, seed: int) -> Interval:
        """Cross-entropy recovered: (zero - spliced) / (zero - clean), 1 for a perfect SAE; documents are resampled."""
        return bootstrap_ratio(self.zero - self.spliced[seed], self.zero - self.clean)


def fit(ensemble: Ensemble, activations: Activations, document: Int[np.ndarray, "token"]) -> Fit:
    """Measure every seed on held-out `activations`, whose rows come from `document`."""
    seeds, rows = len(ensemble.seeds), len(activations)
    kinds, document = np.unique(document[:rows], return_inverse=True)
    firings = torch.zeros(seeds, ensemble.d_sae, dtype=torch.int64)
    residual, total = np.zeros((seeds, len(kinds))), np.zeros(len(kinds))
    centre = (activations.mean - ensemble.mean) * ensemble.scale  # of the held-out tokens, in the ensemble's units
    for start in tqdm(range(0, rows, ROWS), "evaluation", unit="batch", disable=None):
        x = ensemble.normalise(activations.data[start : start + ROWS])
        of = document[start : start + ROWS]
        total += np.bincount(of, (x - centre).square().sum(1).numpy(), len(kinds))
        for seed, (sae, codes) in enumerate(ensemble.codes(x)):
            residual[seed] += np.bincount(of, (codes.decode(sae.W_dec) + sae.b_dec - x).square().sum(1).numpy(), len(kinds))
            firings[seed] += torch.bincount(codes.fired(), minlength=ensemble.d_sae)
    return Fit(firings, rows, residual, total)


@dataclass(frozen=True)
class Encoded:
    """Held-out activations and the codes that every seed gives them: encoded once for all that is asked of them."""

    ensemble: Ensemble
    activations: Activations
    codes: list[list[Codes]]
    """Of each batch of `ROWS` tokens, each seed's."""

    @classmethod
    def of(cls, ensemble: Ensemble, activations: Activations) -> "Encoded":
        batches = (ensemble.normalise(part) for part in activations.data.split(ROWS))
        return cls(ensemble, activations, [[codes for _, codes in ensemble.codes(x)] for x in batches])

    def batches(self) -> Iterator[tuple[slice, Float[Tensor, "token d_in"], list[tuple[Parameters, Codes]]]]:
        """In turn which tokens they are, their normalised activations, and each seed's SAE and codes."""
        for number, codes in enumerate(self.codes):
            rows = slice(number * ROWS, (number + 1) * ROWS)
            yield rows, self.ensemble.normalise(self.activations.data[rows]), list(zip(self.ensemble.saes, codes, strict=True))

    def matrix(self, position: int) -> sparse.csr_array:
        """The feature activations [token, d_sae] of the SAE at `position` of the seeds."""
        parts = []
        for codes in (of_seed[position] for of_seed in self.codes):
            arrays = (codes.values.numpy(), codes.features.numpy(), codes.starts.numpy())
            parts.append(sparse.csr_array(arrays, shape=(len(codes.starts) - 1, self.ensemble.d_sae)))
        return sparse.vstack(parts, format="csr")


def sparse_codes(ensemble: Ensemble, activations: Activations) -> list[sparse.csr_array]:
    """Each seed's feature activations [token, d_sae] on the same tokens."""
    encoded = Encoded.of(ensemble, activations)
    return [encoded.matrix(position) for position in range(len(ensemble.seeds))]


def losses(bridge, ensemble: Ensemble, hook_name: str, contexts: Contexts, tokens: int) -> Losses:
    """Cross-entropy of the model on about `tokens` held-out tokens, clean and under each intervention."""

    def edits(x: Tensor) -> Iterator[tuple[int | str, Tensor]]:
        yield "zero", torch.zeros_like(x)
        yield "mean", ensemble.mean.expand_as(x)
        for seed in range(len(ensemble.seeds)):
            yield seed, ensemble.reconstruct(seed, x)

    found = intervene(bridge, hook_name, contexts, tokens, edits, "losses")
    spliced = np.stack([found.nats[seed] for seed in range(len(ensemble.seeds))])
    return Losses(found.clean, found.nats["zero"], found.nats["mean"], spliced, found.tokens)


@dataclass(frozen=True)
class Predictions:
    """What the model predicts under interventions at one site, summed over the tokens of each document."""

    clean: Float[np.ndarray, "document"]
    """Cross-entropy in nats without an intervention."""
    nats: dict[Hashable, Float[np.ndarray, "document"]]
    """Cross-entropy under each intervention."""
    divergence: dict[Hashable, Float[np.ndarray, "document"]]
    """KL divergence in nats of the prediction under each intervention from the clean one."""
    tokens: Int[np.ndarray, "document"]


def intervene(
    bridge,
    hook_name: str,
    contexts: Contexts,
    tokens: int,
    edits: Callable[[Float[Tensor, "token d_in"]], Iterator[tuple[Hashable, Float[Tensor, "token d_in"]]]],
    described: str = "interventions",
) -> Predictions:
    """Let the model predict about `tokens` held-out tokens, with activations at a site as they are and as `edits` makes them.

    `edits` takes the activations of text tokens and yields what stands in their place, by name. Tokens come from contexts spread
    evenly over all of the held-out text, so that they meet many documents. BOS and separators keep their activations, and are no
    targets. Wherever the model computes, `edits` works on the CPU; what it yields is cast to the model's dtype. Losses are computed in
    float32.
    """
    contexts = contexts.spread(tokens)
    kinds, document = np.unique(contexts.document, return_inverse=True)
    document = document.reshape(contexts.document.shape)
    nats: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(len(kinds)))
    divergence: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(len(kinds)))
    scored, site, device = np.zeros(len(kinds), dtype=int), Site(bridge, hook_name), device_of(bridge)
    with torch.inference_mode():
        for start in tqdm(range(0, len(contexts.tokens), CONTEXTS), described, unit="batch", disable=None):
            rows = slice(start, start + CONTEXTS)
            ids = torch.from_numpy(contexts.tokens[rows]).long().to(device)
            text = torch.from_numpy(contexts.is_text[rows]).to(device)
            before_text = F.pad(text[:, 1:], (0, 1))  # positions that a text token follows
            targets = ids[:, 1:][text[:, 1:]]
            of = document[rows][:, 1:][contexts.is_text[rows][:, 1:]]
            scored += np.bincount(of, minlength=len(kinds))
            value, logits = site.read(ids)
            logits = logits[before_text].float()
            likely = logits.softmax(1)
            clean, expected = _cross_entropies(logits.split(CHUNK), likely, targets)
            nats["clean"] += np.bincount(of, clean, len(kinds))
            for name, edited in edits(value[text].cpu()):
                changed = site.predict(value.index_put((text,), edited.to(device, value.dtype)), before_text)
                true, against = _cross_entropies(changed, likely, targets)
                nats[name] += np.bincount(of, true, len(kinds))
                divergence[name] += np.bincount(of, against - expected, len(kinds))
    return Predictions(nats.pop("clean"), dict(nats), dict(divergence), scored)


def _cross_entropies(
    logits: Iterable[Float[Tensor, "row vocabulary"]], likely: Float[Tensor, "target vocabulary"], targets: Int[Tensor, "target"]
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


def top_contexts(
    ensemble: Ensemble,
    position: int,
    features: list[int],
    activations: Activations,
    contexts: Contexts,
    tokenizer,
    shown: int = 4,
) -> pd.DataFrame:
    """Where features of one seed fire most: one row for each token of the windows around the strongest firings.

    One window a document. Columns: feature, rank of the window, offset from the peak, token, activation (normalised units).
    """
    wanted = torch.tensor(features)
    where = np.flatnonzero(contexts.is_text)[: len(activations)]
    strength = np.zeros((len(features), contexts.tokens.size), dtype=np.float32)
    for start in range(0, len(activations), ROWS):
        x = ensemble.normalise(activations.data[start : start + ROWS])
        _, codes = next(ensemble.of(position).codes(x))
        strength[:, where[start : start + ROWS]] = codes.dense(ensemble.d_sae)[:, wanted].T.numpy()
    rows, width = [], contexts.tokens.shape[1]
    for feature, along in zip(features, strength, strict=True):
        seen: set[int] = set()
        for peak in np.argsort(-along, kind="stable")[: shown * 200]:
            document = int(contexts.document.ravel()[peak])
            if along[peak] <= 0 or len(seen) == shown:
                break
            if document in seen:
                continue
            seen.add(document)
            context, centre = divmod(int(peak), width)
            for index in range(max(1, centre - WINDOW), min(width, centre + WINDOW + 1)):
                token = tokenizer.decode([int(contexts.tokens[context, index])])
                rows.append((feature, len(seen), index - centre, token, float(along[context * width + index])))
    return pd.DataFrame(rows, columns=["feature", "rank", "offset", "token", "activation"])
