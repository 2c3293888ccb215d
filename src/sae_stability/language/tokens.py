"""Tokens as text, whatever tokenizer made them: pieces that join to what was written, and a vocabulary that keeps its spaces."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sae_stability.errors import UserError

BROKEN = "\ufffd"  # what stands for bytes that are no whole character
LONGEST_CHARACTER = 4  # bytes
SPACE = "▁"  # of SentencePiece
INSIDE = "##"  # of WordPiece


def pieces(tokenizer, ids: Sequence[int] | Int[np.ndarray, "token"]) -> list[str]:
    """The text of each of some tokens in a row; joined they are the text of all.

    A character of several tokens is that of the last of them, and the others are empty. So are those that end a character which
    begins before the row. What is broken at the end stays so.
    """
    begin = told = _cut(tokenizer, ids)  # what was told ends at `told`; decoding begins a piece before, for the space between
    found = [""] * told
    for end in range(told + 1, len(ids) + 1):
        before, text = _decoded(tokenizer, ids[begin:told]), _decoded(tokenizer, ids[begin:end])
        if text.endswith(BROKEN) and end < len(ids):  # a character that the next token may end
            found.append("")
            continue
        found.append(text[len(before) :])
        begin, told = told, end
    return found


def _cut(tokenizer, ids: Sequence[int] | Int[np.ndarray, "token"]) -> int:
    """How many tokens at the beginning of a row only end a character that begins before it."""
    for start in range(LONGEST_CHARACTER):
        texts = (_decoded(tokenizer, ids[start:end]) for end in range(start + 1, start + 1 + LONGEST_CHARACTER))
        if any(not text.startswith(BROKEN) for text in texts):
            return start
    return 0


def _decoded(tokenizer, ids: Sequence[int] | Int[np.ndarray, "token"]) -> str:
    return tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False) if len(ids) else ""


def vocabulary(tokenizer, size: int) -> list[str]:
    """Each of the first `size` tokens as text: with the space before a word, and never with two broken characters that look alike.

    A token that is part of a character has no text of its own; it is called what the tokenizer calls it.
    """
    return [_word(tokenizer, token) for token in range(size)]


def _word(tokenizer, token: int) -> str:
    called = tokenizer.convert_ids_to_tokens(token)
    if called is None:  # an id that the tokenizer skips
        return ""
    if SPACE in called:
        return called.replace(SPACE, " ")
    if _has_word_pieces(tokenizer):
        return called.removeprefix(INSIDE) if called.startswith(INSIDE) else f" {called}"
    text = tokenizer.decode([token])
    return called if BROKEN in text else text


def _has_word_pieces(tokenizer) -> bool:
    """Whether its tokens are those of WordPiece, which marks what stands inside a word, and not the space before one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.model).__name__ == "WordPiece"


def check_ids(bridge, *texts: Int[np.ndarray, "context position"]) -> None:
    """Raise `UserError` for a token that the model has no embedding of."""
    largest = max((int(text.max()) for text in texts if text.size), default=0)
    if largest >= bridge.cfg.d_vocab:
        raise UserError(
            f"model: its tokenizer gives token {largest}, and the model embeds {bridge.cfg.d_vocab:,}; resize its embeddings, or "
            "save the tokenizer that it was trained with beside it"
        )
