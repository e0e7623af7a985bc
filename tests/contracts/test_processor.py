"""The processor on a tiny word-level tokenizer: slots, truncation, batches, packing, boxes, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from chiasm import registry
from chiasm.errors import ConfigError, DataError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.collate import collate, pack
from chiasm.processing.processor import ProcessingConfig, Processor
from chiasm.types import Image, Layout, Media, MediaItem, Sample

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    *["Q", "A", ":", "a", "cat", "dog", "yes", "no", "what", "is", "it", ".", "?", "0", "1", "2", "5", "[", "]", ","],
]


@registry.register("front_end", "size")
class SizeFrontEnd(FrontEnd):
    """Opens a picture given by its size: one unit filled with its width."""

    class Config(FrontEndConfig):
        type: str = "size"
        placeholder: str | None = "<image>"

    kind = "image"

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        width, height = medium.data
        return MediaItem(
            "image", torch.full((1, 3, 4, width), float(width)), Layout(1, (3, 4, width), original=(height, width))
        )


def count(kind: str, layout: Layout) -> int:
    return layout.original[1] // 10


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    made = Library(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    named = {f"{k}_token": v for k, v in {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def processor(tokenizer: Tokenizer) -> Processor:
    return Processor(ProcessingConfig(template="simple", media={"image": {"type": "size"}}), tokenizer, count)


def talk(*widths: int, answer: str = "a cat", question: str = "what is it ?") -> list[dict]:
    pictures = [{"type": "image", "image": (w, 20)} for w in widths]
    return [
        {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]


def test_slots_and_mask(processor: Processor, tokenizer: Tokenizer) -> None:
    sample = processor(talk(30, 20), "s", train=True)
    image = tokenizer.id_of("<image>")
    places = torch.nonzero(sample.input_ids == image).flatten().tolist()
    assert [i for item in sample.media for i in item.slots.tolist()] == places
    assert [len(item.slots) for item in sample.media] == [3, 2]
    assert sample.input_ids[sample.loss_mask].tolist() == [WORDS.index(w) for w in ("a", "cat", "</s>")]
    rows = processor.table(sample)
    assert [r.medium for r in rows if r.medium] == ["image 1"] * 3 + ["image 2"] * 2
    assert [r.text for r in rows if r.trained] == ["a", "cat", "</s>"]
    assert rows[0].text == "<s>" and [r.position for r in rows] == list(range(len(sample)))


def test_typed_placeholder_takes_no_slot(processor: Processor) -> None:
    sample = processor(talk(30, question="<image> what <image> ?"), "s")
    assert [len(item.slots) for item in sample.media] == [3]
    assert int((sample.input_ids == WORDS.index("<image>")).sum()) == 3


def test_max_length_never_cuts_a_medium(processor: Processor) -> None:
    whole = processor(talk(30, 20), "s", train=True)
    last = int(whole.media[-1].slots[-1])
    first_trained = int(torch.nonzero(whole.loss_mask)[0])
    for limit in range(1, len(whole) + 2):
        if limit <= last:
            with pytest.raises(
                DataError, match=r"sample 's': image \d of 2 takes positions \d+ to \d+ .* max_length is"
            ):
                processor(talk(30, 20), "s", train=True, max_length=limit)
        elif limit <= first_trained:
            with pytest.raises(DataError, match=f"max_length {limit} cuts off all of its 3 trained tokens"):
                processor(talk(30, 20), "s", train=True, max_length=limit)
        else:
            cut = processor(talk(30, 20), "s", train=True, max_length=limit)
            assert cut.input_ids.tolist() == whole.input_ids.tolist()[:limit]
            assert sum(len(item.slots) for item in cut.media) == 5 and cut.loss_mask.any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(processor: Processor, side: str) -> None:
    samples = [processor(talk(30), "a"), processor(talk(), "b"), processor(talk(30, 30, answer="yes . no ."), "c")]
    batch = collate(samples, pad_id=3, padding_side=side)
    width = max(len(s) for s in samples)
    assert batch.input_ids.shape == (3, width) and batch.ids == ["a", "b", "c"] and batch.labelled
    for row, sample in enumerate(samples):
        real = batch.segment_ids[row] == 1
        assert batch.input_ids[row][real].tolist() == sample.input_ids.tolist()
        assert batch.positions[row][real].tolist() == list(range(len(sample)))
        assert batch.loss_mask[row][real].tolist() == sample.loss_mask.tolist()
        assert (batch.input_ids[row][~real] == 3).all() and not batch.loss_mask[row][~real].any()
        assert bool(real[0]) == (side == "right" or len(sample) == width)
    media = batch.media["image"]
    assert media.owners == [0, 2, 2] and media.counts == [3, 3, 3] and media.inputs.shape == (3, 3, 4, 30)
    assert (batch.input_ids.flatten()[media.slots] == WORDS.index("<image>")).all()
    assert sorted(media.slots.tolist()) == torch.nonzero(batch.input_ids.flatten() == 4).flatten().tolist()


def test_packing(processor: Processor) -> None:
    samples = [processor(talk(30), "a"), processor(talk(), "b"), processor(talk(30, answer="yes"), "c")]
    one = pack(samples, 1000, pad_id=3)
    assert one.input_ids.shape == (1, sum(len(s) for s in samples)) and one.ids == ["a", "b", "c"]
    two = pack(samples, len(samples[0]) + len(samples[1]), pad_id=3)
    assert len(two.input_ids) == 2
    for batch in (one, two):
        found = []
        for row in range(len(batch.input_ids)):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                real = batch.segment_ids[row] == segment
                assert batch.positions[row][real].tolist() == list(range(int(real.sum())))
                found.append((batch.input_ids[row][real].tolist(), batch.loss_mask[row][real].tolist()))
        assert sorted(found) == sorted((s.input_ids.tolist(), s.loss_mask.tolist()) for s in samples)
        media = batch.media["image"]
        assert media.owners == [0, 2]
        assert (batch.input_ids.flatten()[media.slots] == 4).all() and len(set(media.slots.tolist())) == 6
    with pytest.raises(DataError, match=f"sample 'a': {len(samples[0])} tokens do not fit a packed row of 5"):
        pack(samples, 5)
    assert processor.batch([talk(30), talk(30)], pack=True).input_ids.shape[0] == 1


def test_units_of_other_shapes(processor: Processor) -> None:
    with pytest.raises(DataError, match=r"sample '1': a image has units of shape \(3, 4, 20\) but sample '0' has"):
        processor.batch([talk(30), talk(20)])


def test_batch_equals_singles(processor: Processor) -> None:
    batch = processor.batch([talk(30), talk(30, 30)], ids=["a", "b"], padding_side="left")
    for row, single in enumerate([processor(talk(30), "a"), processor(talk(30, 30), "b")]):
        assert batch.input_ids[row][batch.segment_ids[row] > 0].tolist() == single.input_ids.tolist()
    with pytest.raises(DataError, match="1 ids for 2 conversations"):
        processor.batch([talk(), talk()], ids=["a"])
    assert not processor.batch([talk()[:1]], add_generation_prompt=True).labelled


def test_boxes(processor: Processor) -> None:
    box = {"type": "box", "box": [10, 5, 20, 10]}
    messages = [{"role": "user", "content": [{"type": "image", "image": (40, 20)}, "what is it ?", box]}]
    sample = processor(messages, "s")
    assert "0.25" in processor.config.box.write(processor_box((10, 5, 20, 10)), (20, 40), "s")
    assert len(sample) > 10
    with pytest.raises(DataError, match=r"sample 's': box .* does not lie in picture 0 of 40 x 20 pixels"):
        processor(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": (40, 20)}, {"type": "box", "box": [0, 0, 41, 5]}],
                }
            ],
            "s",
        )
    with pytest.raises(DataError, match="a box names picture 0, the conversation has 0"):
        processor([{"role": "user", "content": [box]}], "s")


def processor_box(xyxy: tuple[float, float, float, float]):
    from chiasm.types import Box

    return Box(xyxy)


@pytest.mark.parametrize(
    ("unit", "written"),
    [
        ("share", "[0.25, 0.25, 0.50, 0.50]"),
        ("square", "[0.25, 0.38, 0.50, 0.50]"),
        ("bins", "[250, 250, 500, 500]"),
        ("pixel", "[10, 5, 20, 10]"),
    ],
)
def test_box_units(unit: str, written: str) -> None:
    from chiasm.processing.box import BoxFormat

    assert BoxFormat(unit=unit).write(processor_box((10, 5, 20, 10)), (20, 40), "s") == written


def test_decoder_side(tokenizer: Tokenizer) -> None:
    config = ProcessingConfig(template="simple", media={"image": {"type": "size"}}, target="decoder")
    made = Processor(config, tokenizer, count)
    sample = made(talk(30), "s", train=True)
    assert sample.target_ids.tolist() == [3, *(WORDS.index(w) for w in ("a", "cat", "</s>"))]
    assert not sample.loss_mask.any()
    assert sample.input_ids.tolist() == made(talk(30)[:1], "s", add_generation_prompt=True).input_ids.tolist()
    batch = made.batch([talk(30), talk(answer="yes")], train=True)
    assert batch.target_ids.tolist()[1][-1] == 3 and batch.target_mask.tolist()[1] == [True, True, True, False]
    assert batch.labelled
    with pytest.raises(DataError, match="cannot be packed"):
        made.batch([talk(30)], pack=True)


def test_bad_input(processor: Processor, tokenizer: Tokenizer) -> None:
    for empty in ("", "  "):
        with pytest.raises(DataError, match=r"sample 's', message 2: the answer is empty"):
            processor(talk(30, answer=empty), "s", train=True)
    with pytest.raises(DataError, match=r"sample 's': none of its \d+ tokens is trained"):
        processor(talk(30)[:1], "s", train=True)
    with pytest.raises(DataError, match=r"sample 's': this model takes no video; known: image"):
        processor([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "s")
    with pytest.raises(ConfigError, match="unknown key 'max_lenght'"):
        ProcessingConfig.parse({"template": "simple", "max_lenght": 3})
    with pytest.raises(ConfigError, match="unknown template 'simpel'; did you mean 'simple'"):
        ProcessingConfig.parse({"template": "simpel"})
    with pytest.raises(DataError, match="a batch of no samples"):
        processor.batch([])
    lost = Sample(
        "s", torch.tensor([1]), torch.tensor([False]), [MediaItem("image", torch.ones(1, 2), Layout(1, (2,)))]
    )
    with pytest.raises(DataError, match="has no slots"):
        collate([lost], 0)


def test_tokenizer_without_placeholder(tmp_path: Path) -> None:
    words = [w for w in WORDS if w != "<image>"]
    made = Library(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    processor = Processor(ProcessingConfig(template="simple", media={"image": {"type": "size"}}), tokenizer, count)
    sample = processor([{"role": "user", "content": [Image((30, 20)), "what is it ?"]}], "s")
    assert sample.input_ids[sample.media[0].slots].tolist() == [tokenizer.unk_id] * 3


def test_a_prompt_is_never_cut(processor: Processor) -> None:
    messages = talk(30, 20)[:-1]
    whole = processor(messages, "s", add_generation_prompt=True)
    assert len(processor(messages, "s", add_generation_prompt=True, max_length=len(whole))) == len(whole)
    with pytest.raises(
        DataError, match=rf"sample 's': the prompt has {len(whole)} tokens but max_length is {len(whole) - 1}"
    ):
        processor(messages, "s", add_generation_prompt=True, max_length=len(whole) - 1)
