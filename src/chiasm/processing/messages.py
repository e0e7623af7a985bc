"""What users write, made messages: plain strings, typed parts, the OpenAI and the transformers chat formats.

Media are parts and are never found by scanning text: a text that spells ``<image>`` stays text.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from chiasm import registry
from chiasm.errors import DataError, RegistryError, nearest
from chiasm.types import ROLES, Audio, Box, Call, Graph, Image, Media, Message, Part, Series, Text, Video

for _class in (Image, Video, Audio, Graph, Series):
    registry.register("modality", _class.kind)(_class)

SOURCES = ("path", "url", "base64", "data")  # other keys that may hold a medium; its own type is the first choice
OPENAI = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
MESSAGE_KEYS = ("role", "content", "train", "tool_calls", "tool_call_id")


def parse(conversation: Sequence[Message | Mapping[str, Any]], sample: str = "") -> tuple[Message, ...]:
    """The messages of a conversation. Raises DataError that names the sample, the message and the key.

    ``{"role": "user", "content": "text" | [part, ...]}``, where a part is ``{"type": "text", "text": ...}``,
    ``{"type": "image", "image" | "path" | "url" | "base64": ...}`` and the same for every registered modality,
    ``{"type": "image_url", "image_url": {"url": ...}}``, ``{"type": "box", "box": [x0, y0, x1, y1], "image": 0}``, a
    string, or a part object. ``Message`` objects pass through. ``"train": false`` leaves an assistant turn unlearned.
    An assistant's ``"tool_calls"`` are OpenAI's, beside which ``content`` may be None; ``{"role": "tool",
    "tool_call_id": ...}`` is the result of one.
    """
    if isinstance(conversation, Message | Mapping | str) or not isinstance(conversation, Sequence):
        kind = type(conversation).__name__
        raise DataError(
            f"sample {sample!r}: a conversation is a list of messages, got {kind}; put the message in a list"
        )
    if not conversation:
        raise DataError(f"sample {sample!r}: the conversation is empty; give at least one message")
    return tuple(_message(message, f"sample {sample!r}, message {i + 1}") for i, message in enumerate(conversation))


def _message(message: Message | Mapping[str, Any], where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message is a table with role and content, got {type(message).__name__}")
    for key in message:
        if key not in MESSAGE_KEYS:
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), MESSAGE_KEYS)}")
    calls = _calls(message, where)
    for key in ("role", "content"):
        if message.get(key) is None and not (calls and key == "content"):
            raise DataError(f"{where}: missing key {key!r}")
    role, train = message["role"], message.get("train")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; {nearest(str(role), ROLES)}", "role")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: train is {train!r}; give true or false")
    answers = message.get("tool_call_id") or ""
    if not isinstance(answers, str) or (answers and role != "tool"):
        raise DataError(f"{where}: tool_call_id is {answers!r}; it is a string, in a message of role 'tool'")
    content = message.get("content")
    if content is None or (calls and content == ""):
        content = ()  # an answer that is calls alone
    if isinstance(content, str):
        return Message(role, (Text(content),), train, calls, answers)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise DataError(f"{where}: content is {type(content).__name__}; give a string or a list of parts")
    parts = tuple(_part(p, f"{where}, part {i + 1}") for i, p in enumerate(content))
    return Message(role, parts, train, calls, answers)


def _calls(message: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    """OpenAI's tool calls: ``[{"id": ..., "function": {"name": ..., "arguments": "{...}"}}]``."""
    values = message.get("tool_calls") or ()
    if values and (message.get("role") != "assistant" or not isinstance(values, list | tuple)):
        raise DataError(f"{where}: tool_calls is a list, in a message of the assistant")
    found = []
    for number, value in enumerate(values):
        place = f"{where}, call {number + 1}"
        function = value.get("function") if isinstance(value, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a call needs a function with name and arguments")
        arguments = function.get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        read_arguments(text, place)
        found.append(Call(function["name"], text, str(value.get("id") or "")))
    return tuple(found)


def read_arguments(text: str, where: str) -> dict[str, Any]:
    """The arguments of a call. Raises DataError where they are no JSON object."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{where}: the arguments of a call must be a JSON object, as text", "tools")
    return values


def _part(part: Any, where: str) -> Part:
    if isinstance(part, Text | Media | Box):
        return part
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: a part is a table with a type, got {type(part).__name__}")
    if "type" not in part:
        raise DataError(f"{where}: missing key 'type'; {nearest('', _types())}")
    kind = part["type"]
    if kind == "text":
        return Text(_only(part, where, "text", str))
    if kind == "box":
        return _box(part, where)
    if kind in OPENAI:
        return _openai(part, where)
    try:
        cls = registry.get("modality", str(kind))
    except RegistryError:
        raise DataError(f"{where}: unknown part type {kind!r}; {nearest(str(kind), _types())}") from None
    return _medium(cls, part, where)


def _medium(cls: type[Media], part: Mapping[str, Any], where: str) -> Media:
    """``{"type": kind, kind | path | url | base64 | data: ..., further fields of the class}``."""
    sources = (cls.kind, *SOURCES)
    extra = tuple(f.name for f in fields(cls) if f.name != "data")
    for key in part:
        if key not in ("type", *sources, *extra):
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), (*sources, *extra))}")
    given = [key for key in sources if part.get(key) is not None]
    if len(given) != 1:
        found = f"{len(given)} of them: {', '.join(given)}" if given else "none of them"
        raise DataError(f"{where}: a part of type {cls.kind!r} needs one of {', '.join(sources)}; it has {found}")
    value = part[given[0]]
    data = _decode(value, where) if given[0] == "base64" else value
    return cls(data, **{name: part[name] for name in extra if name in part})


def _openai(part: Mapping[str, Any], where: str) -> Media:
    """``{"type": "image_url", "image_url": {"url": ...}}`` and its relatives for video and audio."""
    kind = part["type"]
    cls = registry.get("modality", OPENAI[kind])
    value = _only(part, where, kind, Mapping | str)
    if isinstance(value, str):
        return cls(value)
    key, known = ("data", ("data", "format")) if kind == "input_audio" else ("url", ("url", "detail"))
    for name in value:
        if name not in known:
            raise DataError(f"{where}: unknown key {kind}.{name}; {nearest(str(name), known)}")
    if not isinstance(value.get(key), str):
        raise DataError(f"{where}: {kind} needs {key!r}, a string")
    return cls(_decode(value[key], where) if kind == "input_audio" else value[key])


def _box(part: Mapping[str, Any], where: str) -> Box:
    for key in part:
        if key not in ("type", "box", "image"):
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), ('box', 'image'))}")
    values = part.get("box")
    if not isinstance(values, Sequence) or len(values) != 4 or not all(isinstance(v, int | float) for v in values):
        raise DataError(f"{where}: box is {values!r}; give four numbers x0, y0, x1, y1 in pixels")
    x0, y0, x1, y1 = (float(v) for v in values)
    return Box((x0, y0, x1, y1), int(part.get("image", 0)))


def _only(part: Mapping[str, Any], where: str, key: str, kind: Any) -> Any:
    """The value of the one key that a part of this type has."""
    for name in part:
        if name not in ("type", key):
            raise DataError(f"{where}: unknown key {name!r}; {nearest(str(name), (key,))}")
    if not isinstance(part.get(key), kind):
        raise DataError(f"{where}: a part of type {part['type']!r} needs {key!r}, got {part.get(key)!r}")
    return part[key]


def _decode(value: Any, where: str) -> Any:
    """The bytes of a base64 string; a data URL passes as it is, its front end opens it."""
    if isinstance(value, str) and value.startswith("data:"):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where}: base64 that cannot be decoded: {error}") from None


def _types() -> list[str]:
    return ["text", "box", *OPENAI, *registry.names("modality")]
