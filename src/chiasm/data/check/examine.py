"""One sample looked at: opened, its pictures' headers read, rendered without pixels, measured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.config import Config
from chiasm.data.base import Example, id_of, with_answer
from chiasm.data.check.kinds import KINDS, Finding
from chiasm.data.loader import Renderer
from chiasm.data.mixture import Mixture
from chiasm.data.shuffle import media_of
from chiasm.errors import ChiasmError, DataError
from chiasm.processing.base import Place
from chiasm.processing.open import PILLOW_LIMIT, open_file, open_picture, picture_size, reason
from chiasm.processing.sketch import sketching
from chiasm.types import Image, Media, Text

ROW = np.dtype(
    [
        *(("id", "u8"), ("content", "u8"), ("tokens", "i4"), ("media", "i4"), ("targets", "i4")),
        *(("turns", "u2"), ("pictures", "u2")),
    ]
)
"""One sample: hashes of its id and content (0: it could not be opened), its numbers of tokens (-1: unknown)."""

PICTURE = np.dtype([("index", "u4"), ("number", "u2"), ("name", "u8"), ("content", "u8"), ("exact", "u1")])
"""One picture: its sample, its number there, hashes of its name and its content (``exact``), or its first bytes."""

HEAD = 4096  # bytes that two files of one size must share before all their bytes are compared
WHOLE = 2**31 - 1  # a length that cuts nothing
REMEMBERED = 4096  # pictures of which a worker knows the size, for those that several samples share


class Rules(Config):
    """What counts as worth a remark, and how thorough the look is."""

    deep: bool = False  # decode every picture and clip, not only the header
    tiny: int = 16  # a picture with a side below this many pixels is odd
    aspect: float = 20.0  # and one whose sides differ by more than this factor


@dataclass(frozen=True)
class Way:
    """How training renders a source: the processor, and the length that it cuts at."""

    processor: Any
    max_length: int | None = None


@dataclass
class Part:
    """What was found in the samples ``start`` … ``start + len(rows) - 1`` (by place) of a source."""

    source: int
    start: int
    rows: np.ndarray
    pictures: np.ndarray
    findings: list[Finding] = field(default_factory=list)


class Examiner:
    """Looks at samples of a mixture. ``ways`` says how each source is rendered; without one, lengths stay unknown."""

    def __init__(self, mixture: Mixture, ways: dict[str, Way], rules: Rules):
        self.mixture, self.rules = mixture, rules
        self.ways = ways
        self._full = {n: Renderer(sketching(w.processor), WHOLE) for n, w in ways.items()}
        self._cut = {n: Renderer(sketching(w.processor), w.max_length) for n, w in ways.items()}
        self._known: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def part(self, source: int, start: int, stop: int) -> Part:
        """The samples number ``start`` … ``stop - 1`` of a source, in its own order."""
        rows = np.zeros(stop - start, ROW)
        pictures: list[tuple[int, int, int, int, int]] = []
        findings: list[Finding] = []
        for place, index in enumerate(range(start, stop)):
            findings += self._sample(source, index, rows[place : place + 1], pictures)
        return Part(source, start, rows, np.array(pictures, PICTURE), findings)

    def _sample(self, source: int, index: int, row: np.ndarray, pictures: list[Any]) -> list[Finding]:
        name = self.mixture.names[source]
        row["tokens"] = row["media"] = row["targets"] = -1
        try:
            example = self.mixture[source, index]
        except Exception as error:  # a source may raise anything at broken data; here it must not end the check
            return [Finding(name, index, id_of(self.mixture.sources[source], index), *_said(error))]
        media = media_of(example)
        first = len(pictures)
        findings = [Finding(name, index, example.id, *said) for said in self._media(example, index, media, pictures)]
        row["id"] = _hash(example.id.encode())
        row["content"] = _content(example, pictures[first:])
        row["turns"] = len(example.messages)
        row["pictures"] = sum(isinstance(m, Image) for m in media)
        if not any(f.fault for f in findings):
            said = self._length(name, example, row) if name in self._full else _answers(example)
            findings += [Finding(name, index, example.id, *one) for one in said]
        if any(f.fault for f in findings):
            row["tokens"] = row["media"] = row["targets"] = -1  # the numbers are those of the samples that can be used
        return findings

    def _media(
        self, example: Example, index: int, media: tuple[Media, ...], pictures: list[Any]
    ) -> Iterator[tuple[str, str]]:
        """Kind and message of what is wrong with each picture; its hashes go to ``pictures``."""
        images = [m for m in media if isinstance(m, Image)]
        for number, image in enumerate(images):
            place = Place(example.id, number, len(images))
            try:
                height, width, content, exact = self._look(image.data, place, self._cap(example.source))
            except Exception as error:
                yield _said(error)
                continue
            name = f"{example.source}/{index}/{number}" if exact else str(image.data)
            pictures.append((index, number, _hash(name.encode()), content, exact))
            small, large = sorted((height, width))
            if small < self.rules.tiny or large > self.rules.aspect * small:
                yield "odd_picture", f"{place}: the picture is {width}x{height} pixels"
        if self.rules.deep and example.source in self.ways:
            for medium in (m for m in media if not isinstance(m, Image)):
                front_end = self.ways[example.source].processor.front_ends.get(medium.kind)
                if front_end is not None:
                    try:
                        front_end(medium, Place(example.id, 0, 1))
                    except Exception as error:
                        yield _said(error)

    def _look(self, data: Any, place: Place, cap: int) -> tuple[int, int, int, int]:
        """(height, width, hash, whether the hash is of all the content). Raises DataError."""
        path = str(data) if isinstance(data, (str, Path)) and str(data)[:5].lower() != "data:" else None
        if path is not None and path in self._known:
            self._known.move_to_end(path)
            return (*self._known[path], 0)
        height, width = picture_size(data, place, cap)
        if self.rules.deep:
            open_picture(data, place, cap)
        if path is None:
            raw = data.encode() if isinstance(data, str) else data if isinstance(data, bytes) else None
            return height, width, _hash(raw if raw is not None else np.asarray(data).tobytes()), 1
        with open_file(path, place, "picture") as file:
            size = Path(path).stat().st_size
            found = height, width, _hash(size.to_bytes(8, "big") + file.read(HEAD))
        self._known[path] = found
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return (*found, 0)

    def _cap(self, source: str) -> int:
        way = self.ways.get(source)
        config = getattr(way.processor.front_ends.get("image"), "config", None) if way else None
        return getattr(config, "max_pixels", PILLOW_LIMIT)

    def _length(self, name: str, example: Example, row: np.ndarray) -> Iterator[tuple[str, str]]:
        """Numbers of tokens into ``row``; kind and message of what is wrong with them."""
        limit = self.ways[name].max_length
        limit = limit if limit is not None else self.ways[name].processor.config.max_length
        try:
            sample = self._full[name].sample(example)
            row["tokens"] = len(sample)
            row["media"] = sum(len(item.slots) for item in sample.media if item.slots is not None)
            row["targets"] = int(sample.loss_mask.sum()) + (0 if sample.target_ids is None else len(sample.target_ids))
            if sample.lost:
                whole = len(sample) + sample.lost
                yield "truncated", f"sample {example.id!r}: {whole} tokens of text, the model reads {len(sample)}"
            if limit is not None and len(sample) > limit:
                cut = self._cut[name].sample(example)
                lost = int(sample.loss_mask.sum()) - int(cut.loss_mask.sum())
                yield (
                    "truncated",
                    f"sample {example.id!r}: {len(sample)} tokens, cut to {limit}; {lost} trained tokens lost",
                )
        except Exception as error:
            yield _said(error)


def _answers(example: Example) -> Iterator[tuple[str, str]]:
    """What is wrong with the answers, where there is no model to render them with."""
    learned = [m for m in example.messages if m.role == "assistant" and m.train is not False]
    for message in learned:
        if not message.media and not any(not isinstance(p, Text) or p.text.strip() for p in message.parts):
            yield "empty_answer", f"sample {example.id!r}: an answer is empty; give it a text, or leave it out"
            return
    if not learned and not example.answers:
        yield "no_target", f"sample {example.id!r}: has no assistant turn that is trained, and no answers; add one"


def _said(error: Exception) -> tuple[str, str]:
    """Kind and message of an error. One that is not ours is a fault of the record, and says its type."""
    if isinstance(error, ChiasmError):
        kind = error.fault if isinstance(error, DataError) and error.fault in KINDS else "record"
        return kind, str(error)
    return "record", f"{type(error).__name__}: {reason(error)}"


def _content(example: Example, pictures: list[Any]) -> int:
    """A hash of what is said and shown: two samples that share it are the same."""
    messages = with_answer(example).messages if example.answers else example.messages
    said = [(m.role, m.train, [p for p in m.parts if not isinstance(p, Image)]) for m in messages]
    bare = repr((said, [p[3] for p in pictures]))  # not its accepted answers: one of them is the last turn
    return _hash(bare.encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") or 1
