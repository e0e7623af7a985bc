"""Streams of text over real tokenizers: pieces joined are the text, no piece holds half a character."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.infer.stream import UNFINISHED, StopStrings, TextStream, overlap
from chiasm.lm.tokenizer import Tokenizer

TEXTS = [
    "The cat sat.",
    " two  spaces ",
    "naïve café – 中文字符, 日本語",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈!",
    "a\n\n\tb",
    "İstanbul ẞ",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE with so few merges that most characters outside ASCII take several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


BYTES = byte_level()


def check(decode, ids: list[int]) -> None:
    stream = TextStream(decode)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith(UNFINISHED) for piece in pieces)
    assert "".join(pieces) + stream.flush() == decode(ids)
    assert stream.flush() == ""


@given(st.text(max_size=30) | st.sampled_from(TEXTS))
@settings(max_examples=200, deadline=None)
def test_text_through_a_byte_level_tokenizer(text):
    check(BYTES.decode, BYTES.encode(text).ids)


@given(st.lists(st.integers(0, 299), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_ids_through_a_byte_level_tokenizer(ids):
    """Also bytes that never become a character."""
    check(BYTES.decode, [i for i in ids if i < BYTES.get_vocab_size()])


@pytest.mark.data
def test_sentencepiece_streams(shared_data):
    tokenizer = Tokenizer.from_folder(shared_data / "weights" / "stories260K")
    for text in TEXTS:
        check(tokenizer.decode, tokenizer.encode(text))
    dice = random.Random(0)
    for _ in range(200):
        check(tokenizer.decode, [dice.randrange(3, 512) for _ in range(dice.randrange(20))])


def test_a_family_of_four_is_never_torn():
    """One emoji of seven code points and 25 bytes: whole code points only."""
    ids = BYTES.encode("👩‍👩‍👧‍👦").ids
    stream = TextStream(BYTES.decode)
    pieces = [piece for piece in map(stream.push, ids) if piece]
    assert len(ids) > len(pieces) and "".join(pieces) == "👩‍👩‍👧‍👦"


@given(st.text(alphabet="ab#", max_size=25), st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_never_leak(text, stops):
    """Whatever the pieces, what comes out is the text before the first stop string to be complete."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    for size in (1, 2, 3, 25):
        gate = StopStrings(stops)
        given_out = ""
        for start in range(0, len(text), size):
            given_out += gate.push(text[start : start + size])
            assert not any(stop in given_out for stop in stops)
        if gate.found is None:
            given_out += gate.flush()
            assert not ends and given_out == text
        else:
            assert text.startswith(given_out + gate.found)
            if size == 1:
                first = min(end for end, _ in ends)
                assert given_out == text[: min(place for end, place in ends if end == first)]


def test_only_what_may_begin_a_stop_is_held_back():
    gate = StopStrings(["</s>", "\nUSER:"])
    assert [gate.push(p) for p in ("Hi <", "/b> <", "/", "s", "> more")] == ["Hi ", "</b> ", "", "", ""]
    assert gate.found == "</s>" and gate.flush() == ""
    assert overlap("abab", "abab") == 2 and overlap("xa", "b") == 0
