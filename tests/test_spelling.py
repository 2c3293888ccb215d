"""Spelling against brute force, planted bundles and random ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_stability.spelling import ASPECTS, BUNDLES, NEAR, Spelling, _shared, forms

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
COLOURS = [" red", " green", " blue", " white", " yellow", " black"]


def vocabulary(size: int = 3000, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Tokens as a language's: most are words, some pieces of words, names, numbers or signs; all are about as frequent."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(LETTERS, rng.integers(2, 8))) for _ in range(size)]
    kinds = [lambda word: " " + word] * 12 + [lambda word: word] * 4 + [lambda word: " " + word.title()] * 2
    kinds += [lambda word: str(len(word) * ord(word[0])), lambda word: "(" + ")" * len(word)]
    tokens = [kinds[rng.integers(len(kinds))](word) for word in words]
    return [*COLOURS, *tokens], rng.uniform(1e-4, 2e-4, size + len(COLOURS))


@pytest.mark.parametrize(
    ("token", "found"),
    [
        (" array", ("ar", "ay", "", "", "")),
        ("ing", ("in", "ng", "", "", "inside a word")),
        (" Array", ("ar", "ay", "capitalised", "", "")),
        ("NaN", ("na", "an", "mixed case", "", "inside a word")),
        (" NOTE", ("no", "te", "capitals", "", "")),
        (" 3", ("", "", "digits", "one character", "")),
        ("fp16", ("fp", "16", "digits", "", "inside a word")),
        ("\n", ("", "", "signs", "", "")),
        ("):", ("):", "):", "signs", "", "")),
        (" x", ("", "", "", "one character", "")),
    ],
)
def test_a_token_has_a_form_in_some_aspects(token, found):
    assert forms(token) == found
    assert len(found) == len(ASPECTS)


@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=6))
def test_what_most_tokens_share_is_the_commonest_form_of_more_than_half(bundles):
    kinds = np.array([[0, 0, 0, 1, 2, -6], [-1, -2, -3, 4, 4, 4]])  # [aspect, token]
    found = _shared(kinds, np.array(bundles))
    for aspect, row in enumerate(kinds):
        for place, bundle in enumerate(bundles):
            most = max(Counter(row[bundle].tolist()).values()) / len(bundle)
            assert found[aspect, place] == (most if most > 0.5 else 0)


def test_random_bundles_are_seldom_alike():
    words, frequency = vocabulary()
    rng, spelling = np.random.default_rng(1), Spelling.of(words, frequency, np.arange(len(words)))
    for size in (2, 3, 8, 40):
        drawn = [spelling.as_alike(rng.choice(len(words), size, replace=False)) for _ in range(200)]
        assert np.mean(np.array(drawn) < 0.05) < 0.1  # 0.05, and three standard errors of 200 bundles


def test_planted_forms_are_told_and_words_of_one_meaning_are_not():
    words, frequency = vocabulary()
    spelling = Spelling.of(words, frequency, np.arange(len(words)))

    def those(holds) -> np.ndarray:
        return np.flatnonzero([holds(word) for word in words])

    planted = {
        "beginning": those(lambda word: word.startswith(" re"))[:4],
        "ending": those(lambda word: word[0] == " " and word.endswith("ly"))[:4],
        "digits": those(lambda word: word.isdigit())[:6],
        "capitalised": those(lambda word: word.strip().istitle())[:6],
        "pieces": those(lambda word: word[0].isalpha())[:12],
    }
    assert all(len(tokens) >= 3 for tokens in planted.values())
    assert all(spelling.as_alike(tokens) < 0.05 for tokens in planted.values())
    assert spelling.as_alike(np.arange(len(COLOURS))) == 1  # all are lower-case words, as random tokens mostly are
    mixed = np.concatenate([planted["digits"][:4], np.arange(4)])
    assert spelling.as_alike(mixed) == 1  # half of them is no majority
    assert spelling.as_alike(planted["digits"][::-1]) == spelling.as_alike(planted["digits"])  # in any order
    assert spelling.as_alike(planted["digits"]) * BUNDLES == round(spelling.as_alike(planted["digits"]) * BUNDLES)


def test_what_all_equally_frequent_tokens_have_is_chance():
    words, frequency = vocabulary(6000)
    digits = np.flatnonzero([word.isdigit() for word in words])
    bundle = digits[np.argsort(frequency[digits])[:9]]
    assert len(digits) > 2 * NEAR + len(bundle)
    assert Spelling.of(words, frequency, np.arange(len(words))).as_alike(bundle) < 0.05
    frequency[digits] *= 1e-3  # digits are the rarest now: any rare token drawn at random is one too
    assert Spelling.of(words, frequency, np.arange(len(words))).as_alike(bundle) == 1
