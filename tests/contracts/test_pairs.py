"""Pairs: a text beside its picture, without slots, cleaned, cut and filled as its tower wants."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoint_kit import make_tokenizer
from PIL import Image

from chiasm.errors import DataError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.processing.clean import cleaner
from chiasm.processing.processor import ProcessingConfig, Processor


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_tokenizer(tmp_path_factory.mktemp("pair")))


def processor(tokenizer: Any, **template: Any) -> Processor:
    config = ProcessingConfig.parse(
        {"template": {"type": "pair", **template}, "media": {"image": {"type": "image", "size": 8}}}
    )
    return Processor(config, tokenizer, lambda kind, layout: 0)


def picture() -> Image.Image:
    return Image.new("RGB", (9, 12), (200, 30, 60))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, str) else {"type": "image", "image": p} for p in parts]}


def test_a_caption_and_an_answer_are_the_same_pair(tokenizer: Tokenizer):
    made = processor(tokenizer)
    lone = made([user(picture(), "a red square")])
    told = made([user(picture(), "describe this"), {"role": "assistant", "content": "a red square"}], train=True)
    assert lone.input_ids.tolist() == told.input_ids.tolist()
    assert lone.input_ids.tolist() == [*tokenizer.prefix, *tokenizer.encode("a red square"), *tokenizer.suffix]
    assert len(lone.media) == 1 and lone.media[0].slots is not None and len(lone.media[0].slots) == 0
    assert not told.loss_mask.any()
    question = processor(tokenizer, read="user")(
        [user(picture(), "what colour?"), {"role": "assistant", "content": "red"}]
    )
    assert tokenizer.decode(question.input_ids.tolist()).strip() == "what colour?"


def test_alone_and_together(tokenizer: Tokenizer):
    made = processor(tokenizer)
    pictures = made.batch([[user(picture())], [user(picture())]])
    assert pictures.input_ids.shape == (2, 0) and pictures.media["image"].inputs.shape == (2, 3, 8, 8)
    texts = made.batch([[user("a red square on the floor")], [user("blue")]])
    assert not texts.media
    lengths = texts.segment_ids.sum(1).tolist()
    assert lengths[0] > lengths[1] and texts.input_ids.shape[1] == lengths[0]


def test_cut_and_filled(tokenizer: Tokenizer):
    long = " ".join(["red"] * 40)
    sample = processor(tokenizer, length=6)([user(long)])
    whole = processor(tokenizer, length=500)([user(long)])
    assert sample.lost == len(whole) - 6 and whole.lost == 0, "what is left out is counted"
    cut = sample.input_ids.tolist()
    assert len(cut) == 6 and cut[len(cut) - len(tokenizer.suffix) :] == tokenizer.suffix
    made = processor(tokenizer, length=12, fill=True)
    filled = made([user("red")])
    bare = processor(tokenizer)([user("red")]).input_ids.tolist()
    assert filled.input_ids.tolist() == bare + [made.fill_id] * (12 - len(bare))
    assert made.collate([filled]).segment_ids.all()  # a tower that was trained on padding sees it


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_an_error(tokenizer: Tokenizer, text: str):
    with pytest.raises(DataError, match=r"'q7'.*empty"):
        processor(tokenizer)([user(text)], id="q7")


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("none", " A  b ", " A  b "),
        ("clip", "  A\tPHOTO of\n a Cat. ", "a photo of a cat."),
        ("siglip", "A photo, of: a  Cat!_", "a photo of a cat"),
    ],
)
def test_cleaning(how: Any, text: str, expected: str):
    assert cleaner(how)(text) == expected


def test_clip_mends_text(tokenizer: Tokenizer):
    pytest.importorskip("ftfy")
    assert cleaner("clip")("a cat’s &amp; “toy”") == 'a cat\'s & "toy"'
