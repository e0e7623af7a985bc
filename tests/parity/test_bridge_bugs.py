"""Faults of the reference code of query transformers, one test each that this package does not have them.

Tested elsewhere: those of the first stage (a batch of one pair, negatives that are none, similarities changed in place,
a temperature that passes 0, gradients that stop at the process's edge) in ``test_query_text.py`` and
``recipes/test_blip2_stage1.py``; queries that start at 0 in ``test_qformer.py``; a lost text half, and perceptrons of
queries that stay random, in ``test_lavis.py``; sum or mean by the language model's name in ``test_rank.py``.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import photo
from test_blip2_hf import QUESTIONS, inputs, make, talk

import chiasm
from chiasm.presets import preset
from chiasm.train.optim import factor
from chiasm.types import Image, Message, Text

PICTURES = [photo(61, 37, 1), photo(30, 85, 2)]
IMAGE = "<image>"


@pytest.fixture(scope="module", params=["opt", "t5", "instruct"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kit = make(request.param, tmp_path_factory.mktemp(request.param) / "folder")
    kit.vlm, kit.kind = chiasm.load(kit.folder), request.param
    return kit


@torch.no_grad()
def compare(made: Any, ids: list[int], pictures: list[Any], batch: Any) -> torch.Tensor:
    """Logits of transformers' model for these ids and pictures, equal to ours for the batch."""
    assert batch.input_ids.tolist() == [ids]
    given: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if pictures:
        given["pixel_values"] = torch.cat([made.images(p, return_tensors="pt").pixel_values for p in pictures])
        if made.reader is not None:
            read = made.reader([QUESTIONS[0]] * len(pictures), return_tensors="pt")
            given |= {"qformer_input_ids": read.input_ids, "qformer_attention_mask": read.attention_mask}
    elif not made.written:
        given = {"inputs_embeds": made.model.get_input_embeddings()(given.pop("input_ids")), **given}
    net = made.model if pictures else made.model.language_model
    if made.written:
        start = torch.tensor([[made.tokenizer.pad_token_id, 30, 41]])
        given["decoder_input_ids"] = start
        batch.target_ids, batch.target_mask = start, torch.ones_like(start).bool()
    expected = net(**given).logits
    found = made.vlm.model(batch, logits="all").logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    return expected


# ---------------------------------------------------------------------- what opens a text, and where pictures stand


def test_a_text_without_a_picture_is_opened_as_transformers_opens_it(made: Any):
    """Its processor hands a text alone to its tokenizer, which opens it: so does ours, once."""
    batch = made.vlm.processor.batch([[Message("user", (Text(QUESTIONS[0]),))]], add_generation_prompt=True)
    ids = made.tokenizer(QUESTIONS[0]).input_ids
    assert ids.count(made.tokenizer.bos_token_id) == (0 if made.written else 1)
    compare(made, ids, [], batch)


def test_two_pictures_stand_before_one_opening(made: Any):
    parts = (*map(Image, PICTURES), Text(QUESTIONS[0]))
    batch = made.vlm.processor.batch([[Message("user", parts)]], add_generation_prompt=True)
    image = made.tokenizer.convert_tokens_to_ids(IMAGE)
    first = compare(made, [image] * 10 + made.tokenizer(QUESTIONS[0]).input_ids, PICTURES, batch)
    turned = made.vlm.processor.batch([[Message("user", (parts[1], parts[0], parts[2]))]], add_generation_prompt=True)
    second = compare(made, [image] * 10 + made.tokenizer(QUESTIONS[0]).input_ids, PICTURES[::-1], turned)
    assert (first - second).abs().max() > 1e-3, "which picture comes first must matter"


def test_text_before_the_first_picture(made: Any):
    config = made.vlm.processor.config
    inline = config.model_copy(update={"template": config.template.edit(media_at="inline")})
    processor = type(made.vlm.processor)(inline, made.vlm.tokenizer, made.vlm.config.model.count)
    before, after = QUESTIONS[0][:9], QUESTIONS[0][9:]
    batch = processor.batch(
        [[Message("user", (Text(before), Image(PICTURES[0]), Text(after)))]], add_generation_prompt=True
    )
    plain = {"add_special_tokens": False}
    opening = [] if made.written else [made.tokenizer.bos_token_id]
    ending = [made.tokenizer.eos_token_id] if made.written else []
    image = made.tokenizer.convert_tokens_to_ids(IMAGE)
    ids = [
        *opening,
        *made.tokenizer(before, **plain).input_ids,
        *[image] * 5,
        *made.tokenizer(after, **plain).input_ids,
    ]
    compare(made, [*ids, *ending], PICTURES[:1], batch)


def test_padding_never_stands_between_a_picture_and_its_text(made: Any):
    """LAVIS and transformers pad the text by itself, so pads come between the two (B9, H3)."""
    talks = [talk(q, p) for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    batch = made.vlm.processor.batch(talks, add_generation_prompt=True, padding_side="left")
    for row in range(2):
        alone = made.vlm.processor.batch([talks[row]], add_generation_prompt=True)
        real = batch.segment_ids[row] != 0
        assert batch.input_ids[row][real].tolist() == alone.input_ids[0].tolist()
        assert real.tolist() == sorted(real.tolist()), "all padding is before everything"
        assert batch.positions[row][real].tolist() == list(range(int(real.sum())))


# ------------------------------------------------------------------------------------------------ what is learned


def test_only_the_answer_and_its_end_are_learned(made: Any):
    """LAVIS masks padding alone, so that OPT also learns its own opening token from the last query (B8)."""
    sample = made.vlm.processor(talk(QUESTIONS[0], PICTURES[0], "two dogs"), "s", train=True)
    end = {"opt": "\n", "t5": "</s>", "instruct": "</s>"}[made.kind]
    if made.written:
        assert not sample.loss_mask.any()
        learned = sample.target_ids[1:]
    else:
        learned = sample.input_ids[sample.loss_mask]
    lead = " " if made.kind == "instruct" else ""
    assert learned.tolist() == made.tokenizer(lead + "two dogs" + end, add_special_tokens=False).input_ids


def test_the_opening_stands_once_in_many_turns(made: Any):
    """MiniGPT-4 puts one before every later question (M2)."""
    talked = [*talk(QUESTIONS[0], PICTURES[0], "a cat"), *talk(QUESTIONS[1], PICTURES[1])]
    sample = made.vlm.processor(talked, "s", add_generation_prompt=True)
    bos = made.tokenizer.bos_token_id
    assert sample.input_ids.tolist().count(bos) == (0 if made.written else 1)


def test_the_text_is_not_cut_for_the_place_of_a_picture(made: Any):
    """transformers' retrieval class cuts as many ids off a text as there are queries (H2)."""
    batch = made.vlm.processor.batch([talk(QUESTIONS[0], PICTURES[0])], add_generation_prompt=True)
    ids = inputs(made, QUESTIONS[0], PICTURES[0])["input_ids"][0].tolist()
    assert batch.input_ids[0].tolist() == ids
    slots = batch.media["image"].slots.tolist()
    assert slots == list(range(5)) and len(ids) > 10


def test_dollars_are_text():
    """MiniGPT-4's padding is the text "$$", which is masked wherever a user writes it (M1)."""
    from chiasm.lm.tokenizer import Tokenizer
    from chiasm.processing.processor import Processor

    config = preset("chiasm.presets.minigpt4:vicuna_7b", tiny=True)
    tokenizer = Tokenizer.from_folder("src/chiasm/weights/tiny-lm")
    processor = Processor(config.processing, tokenizer, config.model.count)  # type: ignore[arg-type]
    sample = processor(talk("What is this?", PICTURES[0], "It costs $$ 5"), "s", train=True)
    learned = tokenizer.decode(sample.input_ids[sample.loss_mask].tolist(), skip_special=False)
    assert learned.strip() == "It costs $$ 5###"
    assert (
        processor.prompt(talk("What is this?", PICTURES[0]))
        == "###Human: <Img><image></Img> What is this? ###Assistant:"
    )


# ------------------------------------------------------------------------------------------------ numbers by rule


def test_rates_follow_steps_not_epochs():
    """LAVIS's cosine moves once an epoch, and its warm-up in the first one only (B6)."""
    shares = [factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert shares[:11] == pytest.approx([k / 10 for k in range(11)])
    assert all(a > b for a, b in itertools.pairwise(shares[10:])), "it falls at every step"


def test_flan_t5_runs_with_the_exact_gelu():
    """As LAVIS trained it, though Flan-T5's own is the tanh form (B7)."""
    for name in ("blip2-flan-t5-xl", "blip2-flan-t5-xxl", "instructblip-flan-t5-xl"):
        assert preset(name).model.lm.config["dense_act_fn"] == "gelu"


def test_vicuna_is_opened_by_what_its_tokenizer_names(made: Any, tmp_path: Path):
    """LAVIS sets Vicuna's opening token to </s> in code; here it is the tokenizer's, read from its files (B12)."""
    if made.kind != "instruct":
        pytest.skip("of InstructBLIP on Vicuna")
    ids = made.vlm.processor.batch([talk(QUESTIONS[0], PICTURES[0])], add_generation_prompt=True).input_ids[0]
    assert ids[5] == made.tokenizer.bos_token_id
    shutil.copytree(made.folder, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.json"):  # as the published folders have it
        if path.name in ("tokenizer_config.json", "special_tokens_map.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "</s>"}))
    again = chiasm.load(tmp_path / "copy").processor.batch(
        [talk(QUESTIONS[0], PICTURES[0])], add_generation_prompt=True
    )
    assert again.input_ids[0, 5] == made.tokenizer.eos_token_id
    assert again.input_ids[0, 6:].tolist() == ids[6:].tolist()
