"""What a feature looks like to a reader: where it fires, most strongly and at random, how strongly, and what it makes likelier."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from sae_stability.language.corpus import Contexts

TOP, AT_RANDOM = 5, 2
"""Windows around the strongest firings of a feature, one a cluster of documents, and around others that are drawn."""
REACH = 10
"""Tokens of a window on each side of the firing that it shows."""
BINS = 20
"""Of the histogram of a feature's activations, from 0 to its strongest."""
LIKELIER = 8
"""Tokens that a feature raises most, and as many that it lowers."""
BLOCK = 256  # directions whose effects on a whole vocabulary are held at a time


def windows(codes: sparse.csc_array, contexts: Contexts) -> pd.DataFrame:
    """Where each feature fires, and how strongly around: one row a window, drawn alike on every call.

    `codes` [token, feature] are those of the first text tokens of `contexts`. Columns: feature; rank, from 1 on by strength, and 0
    of windows around firings that are drawn; first and peak, the rows of `codes` of the first token and of the firing; activations
    of the window's tokens. A window ends with its context.
    """
    context, position = (along[: codes.shape[0]] for along in np.nonzero(contexts.is_text))
    cluster, end = contexts.cluster[context, position], np.searchsorted(context, context, side="right")
    begin = np.searchsorted(context, context, side="left")
    along, found = np.zeros(codes.shape[0], dtype=np.float32), []
    for feature in range(codes.shape[1]):
        fired, strength = firings(codes, feature)
        along[fired] = strength
        strongest = fired[np.lexsort((fired, -strength))]
        _, earliest = np.unique(cluster[strongest], return_index=True)
        top = strongest[np.sort(earliest)[:TOP]]
        drawn = np.random.default_rng(feature).permutation(np.setdiff1d(fired, top))[:AT_RANDOM]
        for rank, peak in [*enumerate(top, 1), *((0, peak) for peak in drawn)]:
            first, last = max(begin[peak], peak - REACH), min(end[peak], peak + REACH + 1)
            found.append((feature, rank, first, peak, along[first:last].tolist()))
        along[fired] = 0
    return pd.DataFrame(found, columns=["feature", "rank", "first", "peak", "activations"])


def firings(codes: sparse.csc_array, feature: int) -> tuple[Int[np.ndarray, "firing"], Float[np.ndarray, "firing"]]:
    """The tokens on which a feature fires, and how strongly."""
    column = slice(codes.indptr[feature], codes.indptr[feature + 1])
    fired, strength = codes.indices[column], codes.data[column]
    return fired[strength > 0], strength[strength > 0]


def histograms(codes: sparse.csc_array) -> pd.DataFrame:
    """One row a feature, with the columns feature, strongest (its largest activation) and histogram: on how many tokens its
    activation lies in each of `BINS` bins from 0 to that."""
    rows = []
    for feature in range(codes.shape[1]):
        _, strength = firings(codes, feature)
        strongest = float(strength.max(initial=0))
        counts, _ = np.histogram(strength, BINS, (0, strongest or 1))
        rows.append({"feature": feature, "strongest": strongest, "histogram": counts.tolist()})
    return pd.DataFrame(rows)


@torch.no_grad()
def logit_effects(bridge, directions: Float[Tensor, "feature d_model"]) -> pd.DataFrame:
    """Which tokens each direction makes likelier and less likely, where it goes straight to the end of the model.

    The logit lens (nostalgebraist 2020) on directions: final norm and unembedding, less what they make of nothing. Columns:
    feature; raised and lowered, the tokens that it moves most, and by how much beside the vocabulary's mean, raised_by and
    lowered_by. Logits have the scale of a final state that is this direction alone.
    """
    weight = next(bridge.parameters())
    rows = []
    nothing = _logits(bridge, torch.zeros_like(directions[:1]).to(weight))
    for start in range(0, len(directions), BLOCK):
        effects = _logits(bridge, directions[start : start + BLOCK].to(weight)) - nothing
        effects -= effects.mean(1, keepdim=True)
        for feature, effect in enumerate(effects, start):
            row: dict = {"feature": feature}
            for name, sign in (("raised", 1), ("lowered", -1)):
                most = (sign * effect).topk(min(LIKELIER, len(effect)))
                row |= {name: most.indices.tolist(), f"{name}_by": (sign * most.values).tolist()}
            rows.append(row)
    return pd.DataFrame(rows)


def _logits(bridge, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state vocabulary"]:
    return bridge.unembed(bridge.ln_final(states[None]))[0].float().cpu()
