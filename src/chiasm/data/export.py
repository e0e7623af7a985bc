"""Examples written for other tools: the way back of the sources that read their formats.

``write(examples, path, "openai" | "sharegpt" | "qwen" | "llava_json" | "messages")``. What a format cannot say is an
error, not left out: a turn that is not trained in ShareGPT, a text that spells ``<image>`` where tags are text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from chiasm.data.base import Example, with_answer
from chiasm.data.sources.tags import tagged, written
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.types import Box, Image, Media, Message, Text, Video


def write(examples: Iterable[Example], path: str | Path, format: str) -> int:
    """Write JSONL, one example a line; returns how many. Raises ConfigError on an unknown format, DataError."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(FORMATS[format](example), ensure_ascii=False) + "\n")
            count += 1
    return count


def to_openai(example: Example) -> dict[str, Any]:
    """``{"id", "messages": [{"role", "content", "weight"?}]}``."""
    turns = []
    for where, message in _messages(example):
        content = [_openai_part(part, where) for part in message.parts]
        turn: dict[str, Any] = {"role": message.role, "content": _plain(content)} | _calls(message)
        if message.train is not None:
            turn["weight"] = int(message.train)
        turns.append(turn)
    return {"id": example.id, "messages": turns}


def to_sharegpt(example: Example) -> dict[str, Any]:
    """``{"id", "conversations": [{"from", "value"}], "images"?, "videos"?, "system"?}``."""
    record: dict[str, Any] = {"id": example.id}
    turns = []
    for number, (where, message) in enumerate(_messages(example)):
        _always_trained(message, where)
        _no_calls(message, where)
        if message.role == "system" and number == 0 and message.text:
            record["system"] = tagged(message, where)
        else:
            turns.append({"from": FROM[message.role], "value": tagged(message, where)})
    return record | {"conversations": turns} | _media(example)


def to_qwen(example: Example) -> dict[str, Any]:
    """``{"id", "messages": [{"role", "content", "loss"?}], "images"?, "videos"?}``."""
    turns = []
    for where, message in _messages(example):
        _no_calls(message, where)
        turn: dict[str, Any] = {"role": message.role, "content": tagged(message, where)}
        turns.append(turn if message.train is None else turn | {"loss": message.train})
    return {"id": example.id, "messages": turns} | _media(example)


def to_llava_json(example: Example) -> dict[str, Any]:
    """``{"id", "image"?, "video"?, "conversations": [{"from", "value"}]}``."""
    turns = []
    for where, message in _messages(example):
        _always_trained(message, where)
        _no_calls(message, where)
        turns.append({"from": FROM[message.role], "value": tagged(message, where)})
    media = _media(example)
    if len(media) > 1:
        raise DataError(f"sample {example.id!r}: has pictures and clips; LLaVA's files take one kind: export as qwen")
    found = {key[:-1]: names[0] if len(names) == 1 else names for key, names in media.items()}
    return {"id": example.id} | found | {"conversations": turns}


def to_messages(example: Example) -> dict[str, Any]:
    """The package's own format: typed parts, answers and task."""
    turns = []
    for number, message in enumerate(example.messages):
        where = f"sample {example.id!r}, message {number + 1}"
        content = [_own_part(part, where) for part in message.parts]
        turn: dict[str, Any] = {"role": message.role, "content": _plain(content)} | _calls(message)
        turns.append(turn if message.train is None else turn | {"train": message.train})
    record: dict[str, Any] = {"id": example.id, "messages": turns}
    return (
        record
        | ({"answers": list(example.answers)} if example.answers else {})
        | ({"task": example.task} if example.task else {})
    )


FROM = {"user": "human", "assistant": "gpt", "system": "system"}
FORMATS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "openai": to_openai,
    "sharegpt": to_sharegpt,
    "qwen": to_qwen,
    "llava_json": to_llava_json,
    "messages": to_messages,
}


def _messages(example: Example) -> list[tuple[str, Message]]:
    """The messages, with an answer at the end where the example has accepted ones, and what errors call them."""
    whole = with_answer(example) if example.answers else example
    return [(f"sample {example.id!r}, message {n + 1}", message) for n, message in enumerate(whole.messages)]


def _calls(message: Message) -> dict[str, Any]:
    """The calls of a turn and the one it answers, as OpenAI writes them."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    return ({"tool_calls": calls} if calls else {}) | ({"tool_call_id": message.answers} if message.answers else {})


def _no_calls(message: Message, where: str) -> None:
    if message.calls or message.role == "tool":
        raise DataError(f"{where}: holds calls of tools, which this format cannot say; export it as openai or messages")


def _always_trained(message: Message, where: str) -> None:
    if message.train is False:
        raise DataError(f"{where}: is not trained, which this format cannot say; export it as openai, qwen or messages")


def _media(example: Example) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for message in example.messages:
        for medium in message.media:
            key = "images" if isinstance(medium, Image) else "videos"
            found.setdefault(key, []).append(written(medium, f"sample {example.id!r}"))
    return found


def _plain(content: list[dict[str, Any]]) -> Any:
    """One text alone stands as a string."""
    return content[0]["text"] if len(content) == 1 and content[0]["type"] == "text" else content


def _openai_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, (Image, Video)):
        kind = f"{part.kind}_url"
        return {"type": kind, kind: {"url": written(part, where)}}
    raise DataError(f"{where}: holds a {type(part).__name__.lower()}, which this format cannot; export it as messages")


def _own_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Box):
        return {"type": "box", "box": list(part.xyxy), "image": part.image}
    assert isinstance(part, Media)
    extra = {k: v for k, v in vars(part).items() if k != "data" and v is not None}
    return {"type": part.kind, part.kind: written(part, where)} | extra
