"""The contract of data sources: examples by index, each a conversation with what an evaluator needs to score it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import Any

from chiasm.config import PartConfig
from chiasm.errors import DataError
from chiasm.types import Message, Text


@dataclass(frozen=True)
class Example:
    """One conversation. ``answers`` are the accepted answers to its last question, for evaluation."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    task: str = ""
    answers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        media = [medium.kind for message in self.messages for medium in message.media]
        said = [f"{media.count(kind)} x {kind}" for kind in dict.fromkeys(media)]
        said += [f"answers {reprlib.repr(list(self.answers))}"] if self.answers else []
        opening = reprlib.repr(next((message.text for message in self.messages if message.role == "user"), ""))
        return f"Example({', '.join([repr(self.id), f'{len(self.messages)} messages', opening, *said])})"


def with_answer(example: Example) -> Example:
    """The example with an assistant turn at its end: its own, else its first accepted answer. Raises DataError."""
    if example.messages and example.messages[-1].role == "assistant":
        return example
    if not example.answers:
        told = f"sample {example.id!r}: has 0 accepted answers; give 'answers' or a last assistant turn"
        raise DataError(told, "no_target")
    return replace(example, messages=(*example.messages, Message("assistant", (Text(example.answers[0]),))))


class SourceConfig(PartConfig):
    """Where examples come from."""


class Source:
    """Examples by index; opening one never depends on the others, so that workers and resumes need only the index.

    Subclasses nest ``Config(SourceConfig)``, take it as only argument and implement ``__len__`` and ``__getitem__``.
    """

    Config: type[SourceConfig] = SourceConfig
    name: str = ""
    quick: bool = False  # opening an example only reads a record, so that all are opened before the first step

    def __init__(self, config: Any):
        self.config = config

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError


def id_of(source: Source, index: int) -> str:
    """The id of an example, without opening it where the source can tell; its number where nothing can."""
    told = getattr(source, "id_of", None)
    return told(index) if told else str(index)
