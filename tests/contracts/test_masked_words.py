"""Hidden words and labels: how many, in which pieces, replaced by what; answers as scores of classes."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from checkpoint_kit import make_tokenizer
from PIL import Image

from chiasm.errors import ConfigError, DataError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.processing.labels import scores
from chiasm.processing.masking import Masker, Masking
from chiasm.processing.processor import ProcessingConfig, Processor
from chiasm.types import Message, Text


class WordPieces:
    """Twenty tokens, of which those from 10 on continue a word."""

    specials: ClassVar = {"[CLS]": 0, "[SEP]": 1, "[MASK]": 2}
    vocab_size = 20

    def token_of(self, index: int) -> str:
        return f"##{index}" if index >= 10 else f"w{index}"


IDS = torch.tensor([0, 3, 10, 11, 4, 5, 12, 6, 7, 8, 9, 13, 14, 3, 4, 5, 6, 15, 7, 1])  # 20 tokens, 12 words


def masker(**options: Any) -> Masker:
    return Masker(Masking(**options), WordPieces())


def test_words_are_hidden_whole():
    made = masker(share=0.4, replaced=1.0, other=0.0)
    words = made.pieces(IDS)
    assert words[:4] == [[1, 2, 3], [4], [5, 6], [7]] and len(words) == 12
    torch.manual_seed(0)
    for _ in range(50):
        masked, hidden = made(IDS)
        for word in words:
            assert len({bool(hidden[place]) for place in word}) == 1
        assert 1 <= int(hidden.sum()) <= 8 and not hidden[0] and not hidden[-1]
        assert (masked[hidden] == 2).all() and torch.equal(masked[~hidden], IDS[~hidden])


def test_shares_of_replacements_and_of_hidden_tokens():
    torch.manual_seed(0)
    made = masker(share=0.15, whole_words=False, last=True)
    counts: Counter[str] = Counter()
    places = torch.zeros(len(IDS))
    for _ in range(1000):
        masked, hidden = made(IDS)
        assert int(hidden.sum()) == 3  # round(20 · 0.15)
        places += hidden
        for new, old in zip(masked[hidden].tolist(), IDS[hidden].tolist(), strict=True):
            counts["mask" if new == 2 else "same" if new == old else "other"] += 1
    total = sum(counts.values())
    assert abs(counts["mask"] / total - 0.805) < 0.03  # 0.8, and now and then "another" token is the mask token
    assert abs(counts["same"] / total - 0.105) < 0.03
    assert places[0] == 0 and bool((places[1:] > 80).all())  # the last token, too


def test_each_piece_by_itself():
    torch.manual_seed(0)
    made = masker(share=0.15, whole_words=False, draw="each", last=True)
    found = torch.tensor([int(made(IDS)[1].sum()) for _ in range(2000)]).float()
    assert abs(found.mean() - 19 * 0.15) < 0.1 and abs(found.var() - 19 * 0.15 * 0.85) < 0.3 and found.min() == 0


def test_a_tokenizer_without_the_mask_token_is_refused():
    with pytest.raises(ConfigError, match=r"masking.token '<mask>' is no control token"):
        masker(token="<mask>")


def test_soft_scores():
    people = ["red"] * 5 + ["dark red"] * 3 + ["brown", "crimson"]
    found = scores(("red", "dark red", "brown", "blue"), (), people, "s")
    assert found is not None and torch.allclose(found, torch.tensor([1.0, 0.9, 0.3, 0.0]))
    turn = (Message("assistant", (Text("brown"),)),)
    assert scores(("red", "brown"), turn, (), "s").tolist() == [0.0, 1.0]
    assert scores(("red", "brown"), turn, ("red",), "s").tolist() == [1.0, 0.0]
    assert scores(("red",), (Message("user", (Text("what?"),)),), (), "s") is None
    with pytest.raises(DataError, match="sample 's': the answer 'bron' is none of the 2 labels"):
        scores(("red", "brown"), turn, ("bron",), "sample 's'")


def test_a_processor_gives_both(tmp_path):
    tokenizer = Tokenizer.from_folder(make_tokenizer(tmp_path))
    token = next(iter(tokenizer.specials))
    config = {
        "template": {"type": "pair", "read": "user"},
        "media": {"image": {"type": "image", "size": 8}},
        "labels": ["yes", "no"],
        "masking": {"token": token, "whole_words": False},
    }
    made = Processor(ProcessingConfig.parse(config), tokenizer, lambda kind, layout: 0)
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    asked = [{"role": "user", "content": [picture, "is the square a red one?"]}, {"role": "assistant", "content": "no"}]
    other = [{"role": "user", "content": [picture, "is it?"]}, {"role": "assistant", "content": "yes"}]
    torch.manual_seed(1)
    batch = made.batch([asked, other], train=True)
    assert batch.scores.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert batch.masked.any(1).all() and not (batch.masked & (batch.segment_ids == 0)).any()
    assert torch.equal(batch.masked_ids[~batch.masked], batch.input_ids[~batch.masked])
    moved = batch.to("cpu", torch.float64)
    assert torch.equal(moved.masked_ids, batch.masked_ids) and moved.scores.dtype == torch.float32
    assert made.batch([asked]).masked is None  # only in training
    with pytest.raises(DataError, match="sample '1': has no answer but 1 of 2"):
        made.batch([asked, other[:1]])
