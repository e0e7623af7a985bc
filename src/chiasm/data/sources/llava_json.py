"""LLaVA's instruction files, as published: ``[{"id", "image", "conversations": [{"from", "value"}, …]}, …]``.

Source: ``docs/Data.md`` and ``train.py`` of haotian-liu/LLaVA c121f04; several images and videos as in LLaVA-NeXT.
Differences by design: every ``<image>`` becomes an image part in its place, so that several in a turn stay several (the
reference makes them one); placeholders and media whose counts differ are an error, not a sample without picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from chiasm.data.base import Example, Source, SourceConfig
from chiasm.data.sources.records import Record, beside, need, read_records
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
class LlavaJson(Source):
    """Conversations with typed parts in place. All records are checked when the file is opened, media when used."""

    Config = LlavaJsonConfig

    def __init__(self, config: LlavaJsonConfig):
        super().__init__(config)
        self.records = read_records(config.file)
        for index in range(len(self.records)):
            self[index]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id = str(record.get("id", index))
        where = f"{self.config.file}, sample {id!r}"
        media = [*self._media(record, "image"), *self._media(record, "video")]
        turns = need(record, "conversations", where)
        texts = [str(need(turn, "value", f"{where}, turn {i + 1}")) for i, turn in enumerate(turns)]
        found = sum(len(PLACEHOLDER.findall(text)) for text in texts)
        if found != len(media):
            raise DataError(
                f"{where}: has {found} placeholders <image> or <video> in its conversation but {len(media)} media; "
                "write one placeholder for each picture or clip, where it belongs"
            )
        rest = iter(media)
        messages = [self._message(turn, rest, f"{where}, turn {i + 1}") for i, turn in enumerate(turns)]
        # ShareGPT parts of the published mixtures open with an answer to a question that is not there: it is left out.
        if messages and messages[0].role == "assistant" and not messages[0].media:
            messages = messages[1:]
        return Example(id, tuple(messages), task=self.config.task)

    def hint(self, index: int) -> int:
        """Characters of the conversation."""
        record = self.records[index]
        return sum(len(t["value"]) for t in record["conversations"]) + 512 * ("image" in record or "video" in record)

    def _media(self, record: Record, kind: str) -> list[Media]:
        """``"a.jpg"`` and ``["a.jpg"]`` are the same."""
        given = record.get(kind)
        names = [] if given is None else given if isinstance(given, list) else [given]
        folder, cls = (self.config.images, Image) if kind == "image" else (self.config.videos, Video)
        return [cls(beside(folder, name)) for name in names]

    def _message(self, turn: Any, media: Iterator[Media], where: str) -> Message:
        role, text = need(turn, "from", where), need(turn, "value", where)
        if role not in ROLES:
            raise DataError(f"{where}: unknown role {role!r}; {nearest(str(role), ROLES)}")
        if not isinstance(text, str):
            raise DataError(f"{where}: value is {type(text).__name__}, a text was expected")
        parts: list[Part] = []
        for piece in PLACEHOLDER.split(text):
            if PLACEHOLDER.fullmatch(piece):
                parts.append(next(media))
            elif piece:
                parts.append(Text(piece))
        return Message(ROLES[role], tuple(parts))
