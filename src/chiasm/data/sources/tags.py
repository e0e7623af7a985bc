"""Texts with ``<image>`` and ``<video>`` in them, made parts, and back: what the chat formats of files share."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.data.sources.records import beside, known_keys
from chiasm.errors import DataError
from chiasm.types import Image, Media, Message, Part, Text, Video

TAGS: dict[str, type[Media]] = {"<image>": Image, "<video>": Video}
TAG = re.compile("|".join(map(re.escape, TAGS)))


def media_list(given: Any, kind: type[Media], folder: str, where: str) -> list[Media]:
    """The media of a record's ``images`` or ``videos``: one or a list of a path, a data URL, or ``{path, bytes}``."""
    items = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    return [kind(_datum(item, folder, f"{where}, {kind.kind} {n + 1}")) for n, item in enumerate(items)]


def _datum(item: Any, folder: str, where: str) -> Any:
    if isinstance(item, Mapping):
        known_keys(item, ("path", "bytes"), where)
        if item.get("bytes") is not None:
            data = item["bytes"]
            return base64.b64decode(data) if isinstance(data, str) else bytes(data)
        item = item.get("path")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    if not isinstance(item, str):
        raise DataError(f"{where}: is {type(item).__name__}; give a path, a data URL, or a table with path or bytes")
    return beside(folder, item)


class Placer:
    """Puts the media of a record where its texts have their tags; ``images`` and ``videos`` each in their order."""

    def __init__(self, images: Sequence[Media], videos: Sequence[Media], texts: Sequence[str], where: str):
        self.rest: dict[str, Iterator[Media]] = {"<image>": iter(images), "<video>": iter(videos)}
        for tag, media in (("<image>", images), ("<video>", videos)):
            found = sum(text.count(tag) for text in texts)
            if found != len(media):
                raise DataError(
                    f"{where}: has {found} {tag} in its texts but {len(media)} {TAGS[tag].kind}s; write one {tag} for "
                    "each, where it belongs",
                    "placeholders",
                )

    def parts(self, text: str) -> tuple[Part, ...]:
        """The parts of one text, in the order of the texts."""
        found: list[Part] = []
        place = 0
        for match in TAG.finditer(text):
            if match.start() > place:
                found.append(Text(text[place : match.start()]))
            found.append(next(self.rest[match.group()]))
            place = match.end()
        if place < len(text):
            found.append(Text(text[place:]))
        return tuple(found)


def tagged(message: Message, where: str) -> str:
    """A message's text with tags for its media. Raises DataError where the text itself spells a tag."""
    said = []
    for part in message.parts:
        if isinstance(part, Text):
            if TAG.search(part.text):
                raise DataError(
                    f"{where}: its text spells {TAG.search(part.text).group()}, "  # type: ignore[union-attr]
                    "which this format takes for a medium; export it as openai or messages"
                )
            said.append(part.text)
        else:
            tag = next((t for t, kind in TAGS.items() if isinstance(part, kind)), None)
            if tag is None:
                kind = getattr(part, "kind", type(part).__name__.lower())
                raise DataError(f"{where}: holds a {kind}, which this format cannot; export it as messages")
            said.append(tag)
    return "".join(said)


def written(medium: Media, where: str) -> str:
    """A medium as a string of JSON: its path, or its bytes as a data URL. Raises DataError."""
    data = medium.data
    if isinstance(data, (str, Path)):
        return str(data)
    if isinstance(data, bytes):
        return f"data:{_mime(data)};base64,{base64.b64encode(data).decode()}"
    raise DataError(f"{where}: a {medium.kind} made from {type(data).__name__} has no file; save it and give its path")


def _mime(data: bytes) -> str:
    for magic, mime in ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif")):
        if data.startswith(magic):
            return mime
    return "image/webp" if data[8:12] == b"WEBP" else "application/octet-stream"
