"""Conversations as other tools write them: OpenAI messages, ShareGPT, and the styles of Qwen and ms-swift.

Sources: OpenAI "Fine-tuning: vision" (JSONL of ``messages`` with typed ``content``, ``weight`` on answers); ShareGPT
as LLaMA-Factory documents it (``conversations`` of ``from``/``value``, ``images``, ``videos``, ``system``); ms-swift
"Custom dataset" (``messages`` with ``<image>`` in their texts and ``loss``; or ``query``, ``response``, ``history``).
Differences by design: an unknown key and a wrong number of tags are errors; nothing is put in front of a text that has
no tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chiasm.data.base import Example, SourceConfig
from chiasm.data.sources.lines import RecordSource
from chiasm.data.sources.records import Record, beside, known_keys, need
from chiasm.data.sources.tags import Placer, media_list
from chiasm.errors import DataError, nearest
from chiasm.processing.messages import parse
from chiasm.registry import register
from chiasm.types import Image, Media, Message, Text, Video

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
OPENAI_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


class ChatConfig(SourceConfig):
    """``file`` is JSONL, or a JSON list; ``media`` the folder that paths of media are relative to."""

    file: str
    media: str = ""
    task: str = ""


class OpenAIConfig(ChatConfig):
    """OpenAI messages."""

    type: str = "openai"


class ShareGPTConfig(ChatConfig):
    """ShareGPT conversations."""

    type: str = "sharegpt"


class QwenConfig(ChatConfig):
    """Conversations in the styles of Qwen and ms-swift."""

    type: str = "qwen"


@register("source", "openai")
class OpenAI(RecordSource):
    """``{"messages": [{"role", "content": text or parts, "weight"?}], "id"?}``. Weight 0 leaves an answer unlearned."""

    Config = OpenAIConfig
    marks = (b'"image_url":', b'"video_url":')
    keys = ("id", "messages")

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id, where = self.where(index, record)
        known_keys(record, self.keys, where)
        turns = _turns(record, "messages", where)
        messages = parse([self._turn(turn, f"{where}, message {n + 1}") for n, turn in enumerate(turns)], id)
        return Example(id, tuple(self._placed(m) for m in messages), task=self.config.task)

    def _turn(self, turn: Any, where: str) -> dict[str, Any]:
        role = _role(need(turn, "role", where), OPENAI_ROLES, where)
        known_keys(turn, ("role", "content", "weight", "tool_calls", "tool_call_id"), where)
        content = turn.get("content") if turn.get("tool_calls") else need(turn, "content", where)
        given: dict[str, Any] = {"role": role, "content": content}
        given |= {key: turn[key] for key in ("tool_calls", "tool_call_id") if key in turn}
        if "weight" in turn:
            if turn["weight"] not in (0, 1) or role != "assistant":
                raise DataError(f"{where}: weight {turn['weight']!r} of a {role} turn; an answer may have 0 or 1")
            given["train"] = bool(turn["weight"])
        return given

    def _placed(self, message: Message) -> Message:
        folder = self.config.media
        parts = (replace(p, data=beside(folder, p.data)) if isinstance(p, Media) else p for p in message.parts)
        return replace(message, parts=tuple(parts))


@register("source", "sharegpt")
class ShareGPT(RecordSource):
    """``{"conversations": [{"from", "value"}], "images"?, "videos"?, "system"?, "id"?}`` with tags in the values."""

    Config = ShareGPTConfig
    keys = ("id", "conversations", "images", "videos", "system")

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id, where = self.where(index, record)
        known_keys(record, self.keys, where)
        said = [("system", record["system"], None)] if record.get("system") else []
        for number, turn in enumerate(_turns(record, "conversations", where)):
            place = f"{where}, turn {number + 1}"
            role = _role(need(turn, "from", place), SHAREGPT_ROLES, place)
            known_keys(turn, ("from", "value"), place)
            said.append((role, need(turn, "value", place), None))
        return Example(id, _placed(said, record, self.config.media, where), task=self.config.task)


@register("source", "qwen")
class Qwen(RecordSource):
    """``{"messages": [{"role", "content", "loss"?}], "images"?, "videos"?, "id"?}`` with tags in the contents, or
    ``{"query", "response", "history"?, "system"?, "images"?, "videos"?, "id"?}``.
    """

    Config = QwenConfig
    keys = ("id", "messages", "images", "videos")
    query_keys = ("id", "query", "response", "history", "system", "images", "videos")

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id, where = self.where(index, record)
        known_keys(record, self.keys if "messages" in record else self.query_keys, where)
        said = self._messages(record, where) if "messages" in record else self._query(record, where)
        return Example(id, _placed(said, record, self.config.media, where), task=self.config.task)

    def _messages(self, record: Record, where: str) -> list[Any]:
        said = []
        for number, turn in enumerate(_turns(record, "messages", where)):
            place = f"{where}, message {number + 1}"
            role = _role(need(turn, "role", place), OPENAI_ROLES, place)
            known_keys(turn, ("role", "content", "loss"), place)
            if turn.get("loss") not in (None, True, False):
                raise DataError(f"{place}: loss is {turn['loss']!r}; give true or false")
            said.append((role, need(turn, "content", place), turn.get("loss")))
        return said

    def _query(self, record: Record, where: str) -> list[Any]:
        said: list[Any] = [("system", record["system"], None)] if record.get("system") else []
        for number, pair in enumerate(record.get("history") or ()):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"{where}, history {number + 1}: is {pair!r}; give a question and an answer")
            said += [("user", pair[0], None), ("assistant", pair[1], None)]
        said.append(("user", need(record, "query", where), None))
        return said + ([("assistant", record["response"], None)] if record.get("response") is not None else [])


def _turns(record: Record, key: str, where: str) -> list[Any]:
    turns = need(record, key, where)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {key} is {turns!r:.60}; a list of turns was expected")
    return turns


def _role(role: Any, known: Mapping[str, str], where: str) -> str:
    if role not in known:
        raise DataError(f"{where}: unknown role {role!r}; {nearest(str(role), known)}", "role")
    return known[role]


def _placed(said: list[Any], record: Record, folder: str, where: str) -> tuple[Message, ...]:
    """Messages from (role, text with tags, train)."""
    for number, (_, text, _) in enumerate(said):
        if not isinstance(text, str):
            raise DataError(f"{where}, turn {number + 1}: its text is {type(text).__name__}, a string was expected")
    images = media_list(record.get("images"), Image, folder, where)
    videos = media_list(record.get("videos"), Video, folder, where)
    placer = Placer(images, videos, [text for _, text, _ in said], where)
    return tuple(Message(role, placer.parts(text) or (Text(""),), train) for role, text, train in said)
