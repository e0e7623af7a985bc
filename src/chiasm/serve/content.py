"""OpenAI's messages, made ours. Text stays text; every picture goes through the gate."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import anyio
from PIL import Image as Pillow
from starlette.requests import Request

from chiasm.errors import ChiasmError
from chiasm.serve.errors import ApiError, refused, shown
from chiasm.serve.gate import Wanted
from chiasm.serve.options import Limits
from chiasm.serve.state import State, state_of
from chiasm.types import Call, Image, Message, Part, Text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
PICTURES = ("image_url", "input_image", "image")


@dataclass
class Turn:
    """A message before its pictures are opened: texts, and the numbers of its pictures."""

    role: str
    parts: list[str | int]
    calls: tuple[Call, ...] = ()
    answers: str = ""  # the id of the call that a tool message answers


@dataclass
class Outline:
    """The messages of a request, and the pictures they name."""

    turns: list[Turn] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)


async def open_messages(request: Request, values: Any) -> tuple[Message, ...]:
    """OpenAI's ``messages`` with every picture opened. Raises ApiError (400)."""
    state = state_of(request)
    outline = read(values, state.options.limits)
    found = await state.gate.bring(outline.wanted)
    with state.hold(sum(map(len, found))):
        async with state.opening:
            return await anyio.to_thread.run_sync(opened, state, outline, found)


def opened(state: State, outline: Outline, found: list[bytes]) -> tuple[Message, ...]:
    """The messages of an outline, its pictures decoded. Blocks. Raises ApiError (400)."""
    start = time.perf_counter()
    pictures = state.gate.decode(outline.wanted, found)
    if pictures:
        state.metrics.opening.see(time.perf_counter() - start)
    return built(outline, pictures)


def built(outline: Outline, pictures: list[Pillow.Image]) -> tuple[Message, ...]:
    """Messages with their pictures. Raises ApiError."""
    try:
        return tuple(_message(turn, pictures) for turn in outline.turns)
    except ChiasmError as error:
        raise refused(error) from None


def _message(turn: Turn, pictures: list[Pillow.Image]) -> Message:
    parts: list[Part] = [Image(pictures[p]) if isinstance(p, int) else Text(p) for p in turn.parts]
    if turn.calls:
        parts = [part for part in parts if part != Text("")]
    return Message(turn.role, tuple(parts), calls=turn.calls, answers=turn.answers)


def read(values: Any, limits: Limits) -> Outline:
    """The outline of ``messages``; nothing is opened. Raises ApiError (400) that names the place."""
    if not isinstance(values, list) or not values:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    if len(values) > limits.messages:
        raise ApiError(400, f"{len(values)} messages; at most {limits.messages} are taken", "messages")
    outline = Outline()
    for number, value in enumerate(values):
        outline.turns.append(_turn(value, f"messages[{number}]", outline.wanted))
    if sum(len(turn.parts) for turn in outline.turns) > limits.parts:
        raise ApiError(400, f"the messages have more than {limits.parts} parts", "messages")
    length = sum(len(part) for turn in outline.turns for part in turn.parts if isinstance(part, str))
    length += sum(len(call.name) + len(call.arguments) for turn in outline.turns for call in turn.calls)
    if length > limits.text_characters:
        text = f"the messages have {length} characters; at most {limits.text_characters} are taken"
        raise ApiError(400, text, "messages", "context_length_exceeded")
    return outline


def _turn(value: Any, place: str, wanted: list[Wanted]) -> Turn:
    if not isinstance(value, dict):
        raise ApiError(400, f"{place} must be an object with role and content", place)
    name = value.get("role")
    if not isinstance(name, str) or name not in ROLES:
        raise ApiError(400, f"{place}.role is {shown(name)}; it must be one of {', '.join(ROLES)}", f"{place}.role")
    role = ROLES[name]
    calls = _calls(value, role, place)
    content = value.get("content")
    if content is None and role == "assistant" and (calls or isinstance(value.get("refusal"), str)):
        content = value.get("refusal") or ""
    answers = str(value.get("tool_call_id") or "")[:128] if role == "tool" else ""
    if isinstance(content, str):
        return Turn(role, [content], calls, answers)
    if not isinstance(content, list) or not content:
        text = f"{place}.content must be a string or a list of at least one part"
        raise ApiError(400, text, f"{place}.content")
    parts = [part(one, role, f"{place}.content[{i}]", wanted) for i, one in enumerate(content)]
    return Turn(role, parts, calls, answers)


def part(part: Any, role: str, place: str, wanted: list[Wanted]) -> str | int:
    """The text of a part, or the number of its picture."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXTS:
        text = part.get(TEXTS[kind])
        if not isinstance(text, str):
            raise ApiError(400, f"{place}.{TEXTS[kind]} must be a string", place)
        return text
    if kind not in PICTURES:
        known = ", ".join([*TEXTS, *PICTURES])
        raise ApiError(400, f"{place} has type {shown(kind)}, which is not taken; known: {known}", place)
    if role in ("tool", "assistant"):
        raise ApiError(400, f"{place}: a message of role {role!r} holds no picture; put it in a user message", place)
    url, detail = _picture(part, str(kind), place)
    wanted.append(Wanted(url, place, detail == "low"))
    return len(wanted) - 1


def _picture(part: dict[str, Any], kind: str, place: str) -> tuple[str, str]:
    """The address and the detail of a picture part, in any of the forms that clients write."""
    value: Any = next((part[key] for key in (kind, "image_url", "image", "url", "base64") if part.get(key)), None)
    detail: Any = part.get("detail")
    if isinstance(value, dict):
        detail, value = value.get("detail", detail), value.get("url")
    if not isinstance(value, str):
        text = f'{place} must name its picture: {{"image_url": {{"url": "data:..."}}}}'
        raise ApiError(400, text, place, "invalid_image")
    if detail is not None and (not isinstance(detail, str) or len(detail) > 16):
        raise ApiError(400, f"{place}: detail must be auto, low or high", place)
    return value, detail or "auto"


def _calls(value: dict[str, Any], role: str, place: str) -> tuple[Call, ...]:
    """The tool calls of an assistant's message. Raises ApiError."""
    calls = value.get("tool_calls")
    if calls is None or calls == []:
        return ()
    if role != "assistant" or not isinstance(calls, list):
        raise ApiError(400, f"{place}.tool_calls must be a list, in a message of the assistant", f"{place}.tool_calls")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        good = isinstance(function, dict) and all(isinstance(function.get(k), str) for k in ("name", "arguments"))
        if not isinstance(function, dict) or not good:
            text = f"{place}.tool_calls[{number}] needs a function with name and arguments, both strings"
            raise ApiError(400, text, f"{place}.tool_calls[{number}]")
        found.append(Call(function["name"], function["arguments"], str(call.get("id") or "")[:128]))
    return tuple(found)
