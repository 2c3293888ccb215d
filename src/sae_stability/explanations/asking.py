"""What language models are asked about a feature, and where their answers are kept."""

import hashlib
import json
from pathlib import Path

from sae_stability.explanations.windows import Window

LONGEST_EXPLANATION = 120  # tokens

EXPLAIN = (
    "You see pieces of text. In each, the tokens on which one feature of a language model is active stand between << and >>. Say "
    "in one short sentence what these tokens, or the texts around them, have in common. Be specific. Answer with the sentence only."
)
DETECT = (
    "A feature of a language model is described in one sentence. You see numbered pieces of text. Is the feature active somewhere "
    "in each? Answer with a JSON list of 0 and 1, one for each piece in order, and nothing else."
)
DETECT_IN_ONE = (
    "A feature of a language model is described in one sentence. You see a piece of text. Is the feature active somewhere in it? "
    "Answer yes or no."
)


def explain_messages(shown: list[Window]) -> list[dict]:
    return _messages(EXPLAIN, _numbered([_marked(window) for window in shown]))


def _marked(window: Window) -> str:
    """A window in one line, its firing tokens between << and >>, which the text itself has with a space inside.

    A token that is part of a character has no text: the one that ends the character is marked in its place.
    """
    parts, fires = [], False
    for token, activation in zip(window.tokens, window.activations, strict=True):
        fires = fires or activation > 0
        if token:
            plain = token.replace("<<", "< <").replace(">>", "> >").replace("\n", "\\n")
            parts.append(f"<<{plain}>>" if fires else plain)
            fires = False
    return "".join(parts)


def detect_messages(text: str, windows: list[list[str]]) -> list[dict]:
    return _messages(DETECT, f"Description: {text}\n\n" + _numbered([_in_one_line(tokens) for tokens in windows]))


def detect_in_one_messages(text: str, window: list[str]) -> list[dict]:
    return _messages(DETECT_IN_ONE, f"Description: {text}\n\nText: {_in_one_line(window)}")


def place_of(asked: dict, folder: Path) -> Path:
    """Where the answer to a question is kept: what was asked, and of whom, names the file."""
    return folder / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _messages(instruction: str, text: str) -> list[dict]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": text}]


def _numbered(pieces: list[str]) -> str:
    return "\n".join(f"{number}. {piece}" for number, piece in enumerate(pieces, 1))


def _in_one_line(tokens: list[str]) -> str:
    return "".join(tokens).replace("\n", "\\n")
