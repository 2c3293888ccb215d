"""Whether tokens are spelled alike: a string rule, judged against random bundles of equally frequent tokens.

A token has at most one form in each of `ASPECTS`. The tokens of a bundle agree in an aspect where more than half of them have the
same form. A lower-case word with a space before it has no form but its beginning and ending: words of one meaning (colours, say)
are written so too, and word pieces are not, so that would make any such set alike.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numba import njit

ASPECTS = ("beginning", "ending", "kind of characters", "one character", "inside a word")
AFFIX = 2  # characters of a beginning or ending
BUNDLES = 200  # random ones that a bundle is judged against
NEAR = 50  # tokens on either side in the order of frequency that may stand in for one
BEYOND = 0.5  # of what chance leaves to agree on: the least agreement that counts


@cache
def forms(token: str) -> tuple[str, ...]:
    """The form of a token in each of `ASPECTS`; empty where it has none."""
    plain = token.strip()
    affixed = len(plain) >= AFFIX
    return (
        plain[:AFFIX].lower() if affixed else "",
        plain[-AFFIX:].lower() if affixed else "",
        _kind(plain),
        "one character" if len(plain) == 1 else "",
        "inside a word" if token[:1].isalpha() else "",
    )


def is_signs(text: str) -> bool:
    """Whether a text has no letter, digit, or mark of a letter such as the vowel signs of Hindi, by Unicode's categories."""
    return not any(unicodedata.category(character)[0] in "LNM" for character in text)


def _kind(plain: str) -> str:
    """What a token consists of; empty for lower-case letters."""
    if is_signs(plain):
        return "signs"
    if any(character.isdigit() for character in plain):
        return "digits"
    if plain.islower():
        return ""
    if plain.isupper():
        return "capitals"
    return "capitalised" if plain.istitle() else "mixed case"


@dataclass(frozen=True)
class Spelling:
    """How the tokens of a vocabulary are spelled, and which of them are about as frequent."""

    forms: Int[np.ndarray, "aspect vocabulary"]
    """A number for each form. Tokens that have none in an aspect have one of their own, below 0: they agree with no other."""
    ranked: Int[np.ndarray, "rank"]
    """The tokens that may be drawn, from rare to frequent; ties in random order."""
    first: Int[np.ndarray, "vocabulary"]
    """The rank of the first token that may stand in for a token."""
    width: int
    """How many may, from there on."""

    @classmethod
    def of(cls, words: list[str], frequency: Float[np.ndarray, "vocabulary"], drawn: Int[np.ndarray, "drawn"]) -> "Spelling":
        """Of the tokens `words`. Random bundles consist of the tokens in `drawn`."""
        names = pd.DataFrame([forms(word) for word in words], columns=list(ASPECTS))
        numbers = np.stack([pd.factorize(names[aspect])[0] for aspect in ASPECTS])
        numbers = np.where((names == "").to_numpy().T, -1 - np.arange(len(words)), numbers)
        shuffled = np.random.default_rng(0).permutation(drawn)
        ranked = shuffled[np.argsort(frequency[shuffled], kind="stable")]
        width = min(2 * NEAR + 1, len(ranked))
        first = np.searchsorted(frequency[ranked], frequency) - NEAR
        first[ranked] = np.arange(len(ranked)) - NEAR
        return cls(numbers, ranked, first.clip(0, len(ranked) - width), width)

    def as_alike(self, tokens: Int[np.ndarray, "token"]) -> float:
        """The share of random bundles, of as many equally frequent tokens, that agree as much as these tokens do. 1 if they don't.

        What counts in an aspect is the agreement beyond the average random bundle's, as a share of what that leaves, if it reaches
        `BEYOND`. A bundle agrees as much as it does where that is rarest among all bundles (the least P value; Westfall & Young
        1993): so many aspects are no better chance than one.
        """
        if not _shared(self.forms, tokens[None]).any():
            return 1.0
        tokens = np.sort(tokens)
        draws = np.random.default_rng(0).integers(self.width, size=(BUNDLES, len(tokens)))
        bundles = np.concatenate([tokens[None], self.ranked[self.first[tokens] + draws]])
        shared = _shared(self.forms, bundles)
        chance = shared[:, 1:].mean(1, keepdims=True)
        beyond = (shared - chance) / np.maximum(1 - chance, 1e-12)
        beyond = np.where(beyond >= BEYOND, beyond, 0)
        rare = (beyond[:, None] >= beyond[:, :, None]).mean(2).min(0)
        return float((rare[1:] <= rare[0]).mean())


@njit(cache=True, nogil=True)
def _shared(
    forms: Int[np.ndarray, "aspect vocabulary"], bundles: Int[np.ndarray, "bundle token"]
) -> Float[np.ndarray, "aspect bundle"]:
    """The share of a bundle's tokens that have one form, where more than half do, else 0.

    Found by a majority vote: where tokens of different forms leave in pairs, a form that more than half have is left (Boyer & Moore
    1991, doi:10.1007/978-94-011-3488-0_5).
    """
    shares = np.zeros((len(forms), len(bundles)))
    for aspect in range(len(forms)):
        for bundle in range(len(bundles)):
            left, votes = -1, 0
            for token in bundles[bundle]:
                form = forms[aspect, token]
                if votes == 0:
                    left = form
                votes += 1 if form == left else -1
            count = 0
            for token in bundles[bundle]:
                count += forms[aspect, token] == left
            share = count / bundles.shape[1]
            shares[aspect, bundle] = share if share > 0.5 else 0.0
    return shares
