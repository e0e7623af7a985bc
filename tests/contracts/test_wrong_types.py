"""What people hand in by mistake: one line of the package's own, never another error from within, never an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import build, make_tokenizer
from PIL import Image

import chiasm
from chiasm.errors import ChiasmError
from chiasm.infer.sampling import Options


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> chiasm.VLM:
    return build(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def connector(name: str) -> Any:
    """A published model with another connector."""
    return chiasm.preset("llava-1.5-7b", tiny=True).edit(**{"model.connectors.image": {"type": name}})


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no conversation": (lambda v: v.generate(None), "a list of messages, got NoneType"),
    "a text": (lambda v: v.generate("hello"), "a list of messages, got str"),
    "a message alone": (lambda v: v.generate({"role": "user", "content": "x"}), "a list of messages, got dict"),
    "half a character": (lambda v: v.processor([{"role": "user", "content": "a \ud83d b"}]), r"half of a character"),
    "a name for a configuration": (lambda v: chiasm.build("llava-1.5-7b"), r"chiasm\.build\(chiasm\.preset\('llava"),
    "no configuration": (lambda v: chiasm.build(None), "a table of keys was expected, got None"),
    "no preset": (lambda v: chiasm.preset(None), "a preset is asked for by its name, a text; got NoneType"),
    "no folder": (lambda v: chiasm.load(None), "by a folder or a hub name, got NoneType"),
    "whole numbers": (lambda v: chiasm.build(v.config, dtype=torch.int8), r"unknown dtype torch\.int8"),
    "a device that is not there": (lambda v: chiasm.build(v.config, device="quark"), "unknown device 'quark'"),
    "a tower for a connector": (
        lambda v: connector("chiasm.encoders.vit:ViT"),
        "is a part of kind 'encoder'",
    ),
    "what is no part": (lambda v: connector("os:system"), "'os:system' has no Config that is a PartConfig"),
    "an empty stop": (lambda v: Options.parse({"stop": ("",)}), "^Options: an empty stop string would stop at once$"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line(vlm: chiasm.VLM, name: str) -> None:
    call, said = WRONG[name]
    with pytest.raises(ChiasmError, match=said) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)


def test_logits_are_asked_for_by_a_known_word(vlm: chiasm.VLM) -> None:
    batch = vlm.processor.batch([[{"role": "user", "content": "x"}]])
    with pytest.raises(ChiasmError, match=r"logits='al'; did you mean 'all'\?"):
        vlm.model(batch, logits="al")


def test_one_picture_is_a_list_of_one(vlm: chiasm.VLM, tmp_path: Path) -> None:
    """A path is a text, and a text is a sequence of letters: each would be opened as a picture."""
    picture = Image.new("RGB", (20, 12), (200, 30, 30))
    picture.save(tmp_path / "a.png")
    answers = [vlm.chat(max_new_tokens=3).say("x", images=i) for i in (str(tmp_path / "a.png"), picture, [picture])]
    assert answers[0] == answers[1] == answers[2]


def test_the_list_of_presets_is_called_as_often_as_one_likes() -> None:
    """``chiasm.presets`` is a package too, which takes the function's place once it is imported."""
    assert [p.name for p in chiasm.presets()] == [p.name for p in chiasm.presets()]
    assert "llava-1.5-7b" in {p.name for p in chiasm.presets()}


def test_what_is_shown_of_samples_and_batches_is_short(vlm: chiasm.VLM) -> None:
    picture = Image.new("RGB", (20, 12), (200, 30, 30))
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, "x"]}]
    batch = vlm.processor.batch([asked])
    for shown in (repr(vlm.processor(asked)), repr(batch), repr(vlm.model(batch, logits="all"))):
        assert len(shown) < 300 and "tensor" not in shown and "[" in shown


def test_what_a_folder_says_itself_is_not_taken_from_elsewhere(vlm: chiasm.VLM, tmp_path: Path) -> None:
    """A template that is handed over and not used would be a prompt that nobody chose."""
    folder = vlm.save(tmp_path / "own")
    for name, value in {"template": "plain", "vision_tower": folder, "revision": "main"}.items():
        with pytest.raises(ChiasmError, match=f"own {name.replace('_', ' ')}|no revision"):
            chiasm.load(folder, **{name: value})
