"""What a newcomer does wrong in the first hour is one clear error; what one prints in a notebook is short."""

from __future__ import annotations

import copy as copying
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import build, make_tokenizer, messages

import chiasm
from chiasm.data.base import Example
from chiasm.errors import CheckpointError, ConfigError
from chiasm.types import Message, Text

LONG = 200  # characters of a short repr


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> chiasm.VLM:
    return build(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("verb", ["save", "export"])
def test_no_folder_where_a_file_is(saved: Path, tmp_path: Path, verb: str, below: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"no folder can be written at .*file.*: {tmp_path / 'file'} is a file"):
        getattr(chiasm.load(saved), verb)(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(saved: Path):
    with pytest.raises(CheckpointError, match=r"no folder can be written at /proc/mine: .+; name another"):
        chiasm.load(saved).save("/proc/mine")


def test_a_save_that_was_killed_says_so(copy: Path):
    """SIGKILL leaves what was being written; config.json goes first and comes back last."""
    (copy / ".writing-00ff").mkdir()
    chiasm.load(copy)  # a whole model beside the remains of another save
    (copy / "config.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"config.json is missing and .writing-... is there.* save it again"):
            chiasm.load(copy)
        (copy / "model.safetensors").unlink(missing_ok=True)


def test_a_newer_folder_is_one_error(copy: Path):
    """Not a list of keys and parts that this version has never heard of."""
    values = json.loads((copy / "config.json").read_text())
    values |= {"format": "chiasm/2", "new": 1, "model": {"type": "telepathy"}}
    (copy / "config.json").write_text(json.dumps(values))
    expected = r"config.json has format 'chiasm/2', this version of chiasm reads 'chiasm/1'; .*install"
    for read in (chiasm.load, chiasm.vlm.read_config):
        with pytest.raises(CheckpointError, match=expected) as caught:
            read(copy)
        assert "telepathy" not in str(caught.value)


def test_an_empty_name_is_not_this_folder():
    with pytest.raises(CheckpointError, match="got an empty text"):
        chiasm.load("")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("cuda",), "device 'cuda' is not there: torch sees 0 of that kind; give cpu"),
        ((torch.device("cuda", 1),), "device 'cuda:1' is not there"),
        (("gpu",), "unknown device 'gpu'; give cpu, cuda"),
        ((torch.int32,), "unknown dtype torch.int32"),
    ],
)
def test_a_device_or_type_that_is_not_there(vlm: chiasm.VLM, monkeypatch: pytest.MonkeyPatch, where: Any, message: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        vlm.to(*where)
    with pytest.raises(ConfigError, match=message):
        vlm.to(**{"dtype" if isinstance(where[0], torch.dtype) else "device": where[0]})


def test_types_by_name(saved: Path):
    vlm = chiasm.load(saved)
    assert vlm.to("bf16").dtype == torch.bfloat16
    assert vlm.to("bfloat16").dtype == torch.bfloat16 and vlm.to("cpu", dtype="float32").dtype == torch.float32
    assert vlm.to("cpu", torch.float64).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------- repr


def test_reprs_are_short(vlm: chiasm.VLM):
    sample = vlm.processor(messages(), id="cat")
    batch = vlm.processor.batch([messages(), messages()])
    example = Example("q1", (Message("user", (Text("What is it? " * 50),)),), answers=("a" * 500,))
    chat = vlm.chat(system="Be brief.")
    shown = [vlm, chat, vlm.processor, vlm.tokenizer, sample, batch, example, sample.media[0], batch.media["image"]]
    for thing in shown:
        assert len(repr(thing)) < LONG and "\n" not in repr(thing) and " object at " not in repr(thing)
    assert repr(chat).endswith("0 turns)") and repr(example).startswith("Example('q1', 1 messages, 'What is it")
    assert repr(sample.media[0]) == "MediaItem(image of [1, 3, 16, 16], 4 tokens)"
    assert repr(vlm.processor) == "Processor(template turns, image by image, Tokenizer(260 ids, 4 control tokens))"


def test_a_notebook_shows_what_the_model_sees(vlm: chiasm.VLM):
    question = [*messages(), {"role": "assistant", "content": "<b>It</b> is a ramp."}]
    sample = vlm.processor(question, id="ramp", train=True)
    page = sample._repr_html_()
    assert page is not None
    learned = sum("#b7e4c7" in part for part in page.split("<span title=")[1:])
    assert learned == int(sample.loss_mask.sum()) > 0
    assert "⟨image 1 × 4⟩" in page and page.count("data:image/png;base64,") == 1
    assert "<b>It</b>" not in page and ">&lt;</span>" in page  # a token is text, never markup


@pytest.mark.parametrize("pack", [False, True])
def test_a_notebook_shows_a_batch(vlm: chiasm.VLM, pack: bool):
    text = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    answered = [*messages(), {"role": "assistant", "content": "Yes."}]
    batch = vlm.processor.batch([text, answered, answered], train=True, pack=pack)
    page = batch._repr_html_()
    assert page is not None and page.count("data:image/png;base64,") == 2
    assert "⟨image 1 × 4⟩" in page and "⟨image 2 × 4⟩" in page
    assert page.count("#b7e4c7") - 1 == int(batch.loss_mask.sum())
    assert ("positions of padding" in page) == (not pack)
    assert ("row 0, segment 3" in page) == pack
    assert batch.to("cpu")._repr_html_() == page


def test_samples_travel_light(vlm: chiasm.VLM):
    """The processor that shows a sample does not go with it to another process."""
    sample = vlm.processor(messages())
    there = pickle.loads(pickle.dumps(sample))
    assert there._repr_html_() is None and repr(there) == repr(sample)
    assert len(pickle.dumps(sample)) < len(pickle.dumps(vlm.processor))
    assert copying.deepcopy(sample).input_ids.tolist() == sample.input_ids.tolist()


def test_a_notebook_shows_a_model(vlm: chiasm.VLM):
    vlm.model.encoders["image"].requires_grad_(False)
    page = vlm._repr_html_()
    vlm.model.encoders["image"].requires_grad_(True)
    size = sum(p.numel() for p in vlm.model.lm.parameters())
    assert page.count("<tr>") == 4 and f">{size:,}</td>" in page and "vicuna_v1" not in page.split("<table>")[0]
    encoder = next(row for row in page.split("<tr>") if "encoders.image" in row)
    assert ">0</td>" in encoder and "vit" in encoder
    assert chiasm.build(chiasm.preset("clip-vit-b32"), device="meta")._repr_html_().count("<tr>") > 2
