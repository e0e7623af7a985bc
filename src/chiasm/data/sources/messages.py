"""Typed messages, one conversation a line: the package's own format.

``{"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text":
"What is it?"}]}, {"role": "assistant", "content": "a cat"}], "answers": ["cat", "a cat"], "task": "animals"}``
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.data.base import Example, SourceConfig
from chiasm.data.sources.lines import RecordSource
from chiasm.data.sources.records import beside, known_keys, need
from chiasm.errors import DataError
from chiasm.processing.messages import parse
from chiasm.registry import register
from chiasm.types import Media, Message

KEYS = ("id", "messages", "answers", "task")


class MessagesConfig(SourceConfig):
    """``file`` is JSONL, or a JSON list; ``media`` the folder that paths of media are relative to."""

    type: str = "messages"
    file: str
    media: str = ""


@register("source", "messages")
class Messages(RecordSource):
    """Conversations as they are. An unknown key is an error. Records are read by number."""

    Config = MessagesConfig
    marks = (b'"image"', b'"image_url"', b'"video"', b'"audio"')

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id, where = self.where(index, record)
        known_keys(record, KEYS, where)
        answers = record.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise DataError(f"{where}: answers is {answers!r}; give a list of texts")
        messages = parse(need(record, "messages", where), id)
        return Example(
            id,
            tuple(self._placed(m) for m in messages),
            task=record.get("task", ""),
            answers=tuple(answers),
        )

    def _placed(self, message: Message) -> Message:
        parts = tuple(
            replace(p, data=beside(self.config.media, p.data)) if isinstance(p, Media) else p for p in message.parts
        )
        return replace(message, parts=parts)
