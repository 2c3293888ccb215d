"""Tokens as text, for tokenizers of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_stability.language.models import load_tokenizer
from sae_stability.language.tokens import BROKEN, pieces, vocabulary

TEXTS = ["the sum of the array", "山川犬猫東京大学", "emoji 😀🎉 and text", "café naïve", "Это другой текст", "x = [1, 2]\n\ty"]


def sentencepiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS[:1] * 50, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "SentencePiece"])
def tokenizer(request):
    return load_tokenizer("docstrings-2l") if request.param == "byte-level" else sentencepiece()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_no_whole_character_is_broken(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, np.array(ids))
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    if BROKEN not in tokenizer.decode(ids):
        assert all(BROKEN not in piece for piece in found)


@pytest.mark.parametrize("text", ["山川犬", "😀 and", "é naïve"])
def test_what_is_left_of_a_character_before_the_row_is_part_of_no_other(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = pieces(tokenizer, ids)
    first = next(place for place, piece in enumerate(whole) if piece.strip())  # the token that ends the first character
    for cut in range(1, first + 1):
        found = pieces(tokenizer, ids[cut:])
        if first + 1 < len(ids):
            begun, *rest = found[first - cut + 1 :]
            assert begun.strip() == whole[first + 1].strip()  # SentencePiece leaves out the space before a row
            assert rest == whole[first + 2 :]
            assert not any(BROKEN in piece for piece in found)


@given(st.lists(st.integers(0, 4095), min_size=1, max_size=12))
@settings(max_examples=50)
def test_pieces_of_any_tokens_are_as_many(ids):
    tokenizer = load_tokenizer_once()
    assert len(pieces(tokenizer, ids)) == len(ids)


def load_tokenizer_once(kept=[]):  # noqa: B006, kept on purpose
    if not kept:
        kept.append(load_tokenizer("docstrings-2l"))
    return kept[0]


def test_spaces_of_words_stay_and_parts_of_characters_are_no_signs(tokenizer):
    words = vocabulary(tokenizer, len(tokenizer))
    assert len(words) == len(tokenizer)
    assert not any(BROKEN in word for word in words)
    ids = tokenizer("sum of the array", add_special_tokens=False)["input_ids"]
    assert "".join(words[token] for token in ids).strip() == "sum of the array"
    parts = tokenizer("猫", add_special_tokens=False)["input_ids"]
    assert len(parts) > 1
    assert all(any(sign.isalnum() for sign in words[token]) or words[token].isprintable() for token in parts)
    assert len({words[token] for token in parts}) == len(set(parts))


def test_pieces_inside_a_word_have_no_space_and_words_have_one():
    pieces_of_words = Tokenizer(models.WordPiece({"[UNK]": 0, "sum": 1, "##ming": 2, "the": 3}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces_of_words, unk_token="[UNK]")
    assert vocabulary(tokenizer, 4)[1:] == [" sum", "ming", " the"]
