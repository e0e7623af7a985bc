"""Rows of tables (parquet, ``datasets``, tars of pairs) made examples: which column holds what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from glob import glob
from typing import Any, Literal

from pydantic import model_validator

from chiasm.config import Config
from chiasm.data.base import Example, SourceConfig
from chiasm.data.sources.records import need
from chiasm.data.sources.tags import TAG, Placer, media_list
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.types import Image, Message, Text, Video

ROLES = {
    **{"human": "user", "gpt": "assistant", "system": "system", "developer": "system"},
    **{"user": "user", "assistant": "assistant"},
}


class Columns(Config):
    """Which column holds what; a column that is not named is not read.

    Either ``conversation`` (a list of turns: ``{role, content}``, ``{from, value}`` or ``{user, assistant}``), or an
    ``answer`` with or without a ``question``. ``images`` and ``videos`` hold one medium or a list: a path, bytes, or
    ``{bytes, path}`` as ``datasets`` stores them. ``answers`` is a list of accepted answers, for evaluation.
    """

    id: str | None = None
    conversation: str | None = None
    system: str | None = None
    question: str | None = None
    answer: str | None = None
    answers: str | None = None
    images: str | None = None
    videos: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Columns:
        if self.conversation is not None and (self.question or self.answer):
            raise ValueError("give either conversation, or question and answer")
        if self.conversation is None and self.answer is None and self.answers is None:
            raise ValueError("name the column of the conversation, or that of the answer")
        return self

    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in self.dump().values() if name is not None]

    def check(self, known: Iterable[str], where: str) -> None:
        """Raise ConfigError where a column is not there, with the nearest."""
        known = list(known)
        for key, name in self.dump().items():
            if name is not None and name not in known:
                raise ConfigError(f"{where}: columns.{key} is {name!r}, which is no column; {nearest(name, known)}")


class RowsConfig(SourceConfig):
    """``media`` is the folder that paths are relative to; ``prompt`` the question of rows that have none.

    ``place``: where media go: ``"tags"`` at the ``<image>`` and ``<video>`` of the texts, ``"first"`` before the first
    question (a tag that a text spells is then plain text). None: ``"tags"`` for a conversation, else ``"first"``.
    """

    columns: Columns
    media: str = ""
    prompt: str = "Describe the image."
    place: Literal["tags", "first"] | None = None
    task: str = ""


def files(pattern: str) -> list[str]:
    """The files of a path or glob pattern, sorted. Raises DataError where there is none."""
    found = sorted(glob(pattern))
    if not found:
        raise DataError(f"{pattern}: 0 files match; check the path")
    return found


def example_of(row: Mapping[str, Any], index: int, config: RowsConfig, where: str) -> Example:
    """A row as an example. Raises DataError that names ``where``, the row and the column."""
    columns = config.columns
    id = str(row[columns.id]) if columns.id and row.get(columns.id) is not None else str(index)
    where = f"{where}, sample {id!r}"
    images = media_list(_cell(row, columns.images), Image, config.media, where)
    videos = media_list(_cell(row, columns.videos), Video, config.media, where)
    answers = _answers(_cell(row, columns.answers), where)
    if columns.conversation is not None:
        said = _turns(need(row, columns.conversation, where), where)
    else:
        said = [("user", _text(_cell(row, columns.question), config.prompt, f"{where}, {columns.question}"))]
        if columns.answer is not None:
            said.append(("assistant", _text(_cell(row, columns.answer), None, f"{where}, {columns.answer}")))
    if columns.system is not None and row.get(columns.system):
        said.insert(0, ("system", str(row[columns.system])))
    place = config.place or ("tags" if columns.conversation is not None else "first")
    if place == "tags":
        placer = Placer(images, videos, [text for _, text in said], where)
        messages = [Message(role, placer.parts(text) or (Text(""),)) for role, text in said]
    else:
        first = next((n for n, (role, _) in enumerate(said) if role == "user"), None)
        if first is None and (images or videos):
            raise DataError(f"{where}: has {len(images) + len(videos)} media and no user turn to put them in")
        messages = [
            Message(role, (*(images if n == first else ()), *(videos if n == first else ()), Text(text)))
            for n, (role, text) in enumerate(said)
        ]
    return Example(id, tuple(messages), task=config.task, answers=answers)


def _cell(row: Mapping[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


def _text(value: Any, default: str | None, where: str) -> str:
    value = default if value is None else value
    if not isinstance(value, str):
        raise DataError(f"{where}: is {type(value).__name__}, a text was expected")
    return value


def _answers(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise DataError(f"{where}: answers is {value!r:.60}; a list of texts was expected")
    return tuple(value)


def _turns(turns: Any, where: str) -> list[tuple[str, str]]:
    """(role, text with tags) of each turn, whichever of the three shapes it has."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: the conversation is {turns!r:.60}; a list of turns was expected")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        place = f"{where}, turn {number + 1}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: is {type(turn).__name__}, a table was expected")
        if turn.get("user") is not None or turn.get("assistant") is not None:
            pairs = [("user", turn.get("user")), ("assistant", turn.get("assistant"))]
            said += [(role, _content(text, place)) for role, text in pairs if text is not None]
            continue
        keys = ("role", "content") if "role" in turn else ("from", "value")
        role = need(turn, keys[0], place)
        if role not in ROLES:
            raise DataError(f"{place}: unknown role {role!r}; {nearest(str(role), ROLES)}", "role")
        said.append((ROLES[role], _content(need(turn, keys[1], place), place)))
    return said


def _content(content: Any, where: str) -> str:
    """A text, or typed parts whose media stand in columns of their own: ``[{type: image}, {type: text, text}]``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where}: its text is {type(content).__name__}; a text or a list of parts was expected")
    said = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "video"):
            said.append(f"<{kind}>")
        elif kind == "text" and isinstance(part.get("text"), str):
            if TAG.search(part["text"]):
                raise DataError(
                    f"{where}: a text spells {TAG.search(part['text']).group()}, "  # type: ignore[union-attr]
                    "which cannot be told from a medium here; write the conversation as messages"
                )
            said.append(part["text"])
        else:
            raise DataError(f"{where}: part {part!r:.60}; parts are text, image and video")
    return "".join(said)
