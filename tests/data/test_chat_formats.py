"""Conversations of other tools: read as published, written back, and what is refused."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest

from chiasm import registry
from chiasm.data.base import Example
from chiasm.data.export import FORMATS, write
from chiasm.errors import ConfigError, DataError
from chiasm.types import Audio, Image, Message, Text, Video


def source(tmp_path: Path, type: str, *records: object, **config: object):
    file = tmp_path / f"{type}.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records))
    cls = registry.get("source", type)
    return cls(cls.Config(file=str(file), **config))


def test_openai(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What <image> is"},
                    {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            },
            {"role": "assistant", "content": "A cat.", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "weight": 1},
        ]
    }
    example = source(tmp_path, "openai", record, media="pictures")[0]
    assert example.id == "0" and [m.role for m in example.messages] == ["system", *["user", "assistant"] * 2]
    assert example.messages[1].parts == (Text("What <image> is"), Image("pictures/a.jpg"), Image(url))
    assert [m.train for m in example.messages] == [None, None, False, None, True]


def test_sharegpt(tmp_path):
    record = {
        "id": 9,
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "<image>From <image> to <video>?"},
            {"from": "gpt", "value": "It grew."},
        ],
        "images": ["a.jpg", "/b.jpg"],
        "videos": "c.mp4",
    }
    example = source(tmp_path, "sharegpt", record, media="m")[0]
    assert example.id == "9" and example.messages[0] == Message("system", (Text("Be brief."),))
    assert example.messages[1].parts == (
        *(Image("m/a.jpg"), Text("From "), Image("/b.jpg"), Text(" to "), Video("m/c.mp4"), Text("?")),
    )


def test_qwen_in_both_styles(tmp_path):
    png = base64.b64encode(b"\x89PNG").decode()
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A.", "loss": False},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "B."},
            ],
            "images": [{"bytes": png, "path": None}],
        },
        {"query": "<image>Now?", "response": "C.", "history": [["Hi", "Hello"]], "system": "S", "images": "a.jpg"},
    ]
    one, two = (source(tmp_path, "qwen", *records, media="m")[i] for i in range(2))
    assert one.messages[0].parts == (Image(b"\x89PNG"), Text("What?"))
    assert [m.train for m in one.messages] == [None, False, None, None]
    assert [(m.role, m.text) for m in two.messages] == [
        *(("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Now?"), ("assistant", "C.")),
    ]
    assert two.messages[3].media == (Image("m/a.jpg"),)


TALK = [{"role": "user", "content": "<image>A?"}, {"role": "assistant", "content": "b"}]
SAID = [{"from": "human", "value": "<image>A?"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("type", "record", "message"),
    [
        ("openai", {"mesages": TALK}, "sample '0': unknown key 'mesages'; did you mean 'messages'"),
        (
            "openai",
            {"messages": [{"role": "usr", "content": "A"}]},
            "message 1: unknown role 'usr'; did you mean 'user'",
        ),
        ("openai", {"messages": [{"role": "user", "content": "A", "name": "x"}]}, "message 1: unknown key 'name'"),
        ("openai", {"messages": [{"role": "user", "content": "A", "weight": 0}]}, "weight 0 of a user turn"),
        ("openai", {"messages": []}, "messages is .*; a list of turns was expected"),
        ("sharegpt", {"conversations": SAID, "image": "a.jpg"}, "unknown key 'image'; did you mean 'images'"),
        ("sharegpt", {"conversations": SAID}, "has 1 <image> in its texts but 0 images"),
        ("sharegpt", {"conversations": SAID, "images": ["a", "b"]}, "has 1 <image> in its texts but 2 images"),
        ("sharegpt", {"conversations": [{"from": "humn", "value": ""}]}, "unknown role 'humn'; did you mean 'human'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 3}]}, "its text is int, a string was expected"),
        ("qwen", {"messages": TALK, "images": [{"byts": ""}]}, "image 1: unknown key 'byts'; did you mean 'bytes'"),
        ("qwen", {"query": "A?", "respons": "b"}, "unknown key 'respons'; did you mean 'response'"),
        ("qwen", {"query": "A?", "history": [["a"]]}, "history 1: is .*; give a question and an answer"),
        ("qwen", {"messages": [{"role": "user", "content": "A", "loss": 3}]}, "loss is 3; give true or false"),
    ],
)
def test_refused(tmp_path, type, record, message):
    with pytest.raises(DataError, match=message):
        source(tmp_path, type, record)[0]


EXAMPLES = [
    Example("t", (Message("user", (Text("Hi"),)), Message("assistant", (Text("Hello."),)))),
    Example(
        "p",
        (
            Message("system", (Text("Be brief."),)),
            Message("user", (Image("x/a.jpg"), Text("\nFrom this to "), Image("b.jpg"), Text("?"))),
            Message("assistant", (Text("It grew."),)),
            Message("user", (Text("Sure?"),)),
            Message("assistant", (Text("Yes."),)),
        ),
    ),
    Example("v", (Message("user", (Video("c.mp4"), Text("What?"))), Message("assistant", (Text("A jump."),)))),
]
UNTRAINED = Example("u", (Message("user", (Text("Q"),)), Message("assistant", (Text("A"),), train=False)))


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(tmp_path, format):
    examples = [*EXAMPLES, *([UNTRAINED] if format in ("openai", "qwen", "messages") else [])]
    assert write(examples, tmp_path / "out.jsonl", format) == len(examples)
    cls = registry.get("source", format)
    back = cls(cls.Config(file=str(tmp_path / "out.jsonl")))
    assert [back[i] for i in range(len(back))] == examples
    again = pickle.loads(pickle.dumps(back))
    assert again[1] == examples[1]


def test_answers_and_bytes_on_the_way_out(tmp_path):
    example = Example("a", (Message("user", (Image(b"\xff\xd8\xff"), Text("Q"))),), answers=("yes", "yep"))
    write([example], tmp_path / "o.jsonl", "openai")
    record = json.loads((tmp_path / "o.jsonl").read_text())
    assert record["messages"][1] == {"role": "assistant", "content": "yes"}
    assert record["messages"][0]["content"][0]["image_url"]["url"] == "data:image/jpeg;base64,/9j/"


@pytest.mark.parametrize(
    ("example", "format", "message"),
    [
        (UNTRAINED, "sharegpt", "message 2: is not trained, which this format cannot say"),
        (UNTRAINED, "llava_json", "message 2: is not trained"),
        (Example("x", (Message("user", (Text("a <image>"),)),)), "qwen", "its text spells <image>"),
        (Example("x", (Message("user", (Audio("a.wav"),)),)), "sharegpt", "holds a audio, which this format cannot"),
        (Example("x", (Message("user", (Image(object()),)),)), "openai", "made from object has no file"),
    ],
)
def test_what_a_format_cannot_say_is_an_error(tmp_path, example, format, message):
    with pytest.raises(DataError, match=message):
        write([example], tmp_path / "o.jsonl", format)


def test_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'shareGPT'; did you mean 'sharegpt'"):
        write([], tmp_path / "o", "shareGPT")
