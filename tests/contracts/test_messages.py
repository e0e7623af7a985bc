"""Messages in every accepted form, and each wrong one with an error that names what to change."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import pytest

from chiasm import registry
from chiasm.errors import DataError
from chiasm.processing.messages import parse
from chiasm.types import Audio, Box, Image, Media, Message, Text, Video


@dataclass(frozen=True)
class Smell(Media):
    strength: int = 0
    kind = "smell"


registry.register("modality", "smell")(Smell)


def one(part: object) -> object:
    return parse([{"role": "user", "content": [part]}], "x")[0].parts[0]


def test_forms() -> None:
    assert parse([{"role": "user", "content": "<image> hi"}]) == (Message("user", (Text("<image> hi"),)),)
    url = "data:image/png;base64,aGk="
    assert one({"type": "image_url", "image_url": {"url": url, "detail": "low"}}) == Image(url)
    assert one({"type": "image_url", "image_url": url}) == Image(url)
    for key in ("image", "path", "url", "data"):
        assert one({"type": "image", key: "a.jpg"}) == Image("a.jpg")
    assert one({"type": "image", "base64": base64.b64encode(b"hi").decode()}) == Image(b"hi")
    assert one({"type": "image", "base64": url}) == Image(url)
    assert one({"type": "video", "video": "a.mp4"}) == Video("a.mp4")
    assert one({"type": "video", "video": [1], "fps": 2.0}) == Video([1], fps=2.0)
    sound = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}
    assert one(sound) == Audio(b"hi")
    assert one({"type": "smell", "smell": "rose", "strength": 3}) == Smell("rose", strength=3)
    assert one({"type": "box", "box": [0, 1, 2, 3], "image": 1}) == Box((0, 1, 2, 3), 1)
    assert one("text") == Text("text") and one(Image("a")) == Image("a")
    assert parse([{"role": "assistant", "content": "a", "train": False}])[0].train is False
    message = Message("user", (Text("a"),))
    assert parse([message])[0] is message


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([], "sample 'x': the conversation is empty"),
        ("hi", "a conversation is a list of messages, got str"),
        ({"role": "user", "content": "a"}, "got dict; put the message in a list"),
        ([{"role": "usr", "content": "a"}], "message 1: unknown role 'usr'; did you mean 'user'"),
        ([{"role": "user", "text": "a"}], "unknown key 'text'"),
        ([{"role": "user", "contents": "a"}], "unknown key 'contents'; did you mean 'content'"),
        ([{"role": "user"}], "missing key 'content'"),
        ([{"role": "user", "content": 3}], "content is int; give a string or a list of parts"),
        ([{"role": "user", "content": "a", "train": "no"}], "train is 'no'; give true or false"),
        ([{"role": "user", "content": [{"text": "a"}]}], "part 1: missing key 'type'"),
        (
            [{"role": "user", "content": [{"type": "imgae", "image": "a"}]}],
            "unknown part type 'imgae'; did you mean 'image'",
        ),
        ([{"role": "user", "content": [{"type": "image", "img": "a"}]}], "unknown key 'img'"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "needs one of image, path, url, base64, data; it has none",
        ),
        ([{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}], "it has 2 of them: path, url"),
        ([{"role": "user", "content": [{"type": "image", "base64": "%%"}]}], "base64 that cannot be decoded"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "a"}}]}],
            "unknown key image_url.uri",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "needs 'text', got 3"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "bold": 1}]}], "unknown key 'bold'"),
        ([{"role": "user", "content": [{"type": "box", "box": [1, 2]}]}], "give four numbers"),
        ([{"role": "user", "content": [3]}], "a part is a table with a type, got int"),
        ([3], "a message is a table with role and content, got int"),
    ],
)
def test_wrong_forms(conversation: object, said: str) -> None:
    with pytest.raises(DataError) as error:
        parse(conversation, "x")
    assert said in str(error.value) and "sample 'x'" in str(error.value)
