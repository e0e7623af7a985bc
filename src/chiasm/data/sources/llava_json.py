"""LLaVA's instruction files, as published: ``[{"id", "image", "conversations": [{"from", "value"}, …]}, …]``.

Source: ``docs/Data.md`` and ``train.py`` of haotian-liu/LLaVA c121f04; several images and videos as in LLaVA-NeXT.
Differences by design: every ``<image>`` becomes an image part in its place, so that several in a turn stay several (the
reference makes them one); placeholders and media whose counts differ are an error, not a sample without picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from chiasm.data.base import Example, SourceConfig
from chiasm.data.sources.lines import RecordSource
from chiasm.data.sources.records import Record, beside, need
from chiasm.errors import DataError, nearest
from chiasm.registry import register
from chiasm.types import Image, Media, Message, Part, Text, Video

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
PLACEHOLDER = re.compile(r"(<image>|<video>)")


class LlavaJsonConfig(SourceConfig):
    """``file`` is JSON or JSONL; ``images`` and ``videos`` are the folders that its paths are relative to."""

    type: str = "llava_json"
    file: str
    images: str = ""
    videos: str = ""
    task: str = ""


@register("source", "llava_json")
class LlavaJson(RecordSource):
    """Conversations with typed parts in place. Records are read by number: memory does not grow with the texts."""

    Config = LlavaJsonConfig

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id, where = self.where(index, record)
        media = [*self._media(record, "image"), *self._media(record, "video")]
        turns = need(record, "conversations", where)
        if not isinstance(turns, list):
            raise DataError(f"{where}: conversations is {type(turns).__name__}, a list of turns was expected")
        texts = [str(need(turn, "value", f"{where}, turn {i + 1}")) for i, turn in enumerate(turns)]
        found = sum(len(PLACEHOLDER.findall(text)) for text in texts)
        if found != len(media):
            raise DataError(
                f"{where}: has {found} placeholders <image> or <video> in its conversation but {len(media)} media; "
                "write one placeholder for each picture or clip, where it belongs",
                "placeholders",
            )
        rest = iter(media)
        messages = [self._message(turn, rest, f"{where}, turn {i + 1}") for i, turn in enumerate(turns)]
        # ShareGPT parts of the published mixtures open with an answer to a question that is not there: it is left out.
        if messages and messages[0].role == "assistant" and not messages[0].media:
            messages = messages[1:]
        return Example(id, tuple(messages), task=self.config.task)

    def _media(self, record: Record, kind: str) -> list[Media]:
        """``"a.jpg"`` and ``["a.jpg"]`` are the same."""
        given = record.get(kind)
        names = [] if given is None else given if isinstance(given, list) else [given]
        folder, cls = (self.config.images, Image) if kind == "image" else (self.config.videos, Video)
        return [cls(beside(folder, name)) for name in names]

    def _message(self, turn: Any, media: Iterator[Media], where: str) -> Message:
        role, text = need(turn, "from", where), need(turn, "value", where)
        if role not in ROLES:
            raise DataError(f"{where}: unknown role {role!r}; {nearest(str(role), ROLES)}", "role")
        if not isinstance(text, str):
            raise DataError(f"{where}: value is {type(text).__name__}, a text was expected")
        parts: list[Part] = []
        for piece in PLACEHOLDER.split(text):
            if PLACEHOLDER.fullmatch(piece):
                parts.append(next(media))
            elif piece:
                parts.append(Text(piece))
        return Message(ROLES[role], tuple(parts))
