"""Samples that training leaves out: a quarantine file that is known before, and faults that are met on the way.

The file is JSONL, one sample a line: ``{"source": "coco", "index": 17, "id": "0033471", "reason": "missing_picture",
"message": "..."}``. ``chiasm check --write-quarantine`` makes it, the recipe's ``data.quarantine`` names it, and a run
that skips bad samples writes the same lines, with the step, beside its log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from chiasm.config import Config, read_lines, read_text
from chiasm.data.base import Source
from chiasm.errors import ConfigError, DataError, nearest

HELD_OUT = "held_out/"  # before the name of a held-out source, which may be that of a training source too
KEYS = ("source", "index", "id", "reason", "message", "step")


@dataclass(frozen=True)
class Quarantined:
    """One sample that is left out. ``source`` is its source's name in the recipe, ``index`` its number there."""

    source: str
    index: int
    id: str
    reason: str
    message: str = ""

    def dump(self) -> dict[str, Any]:
        """As a line of the file."""
        return {key: value for key, value in vars(self).items() if value != "" or key == "id"}


class Quarantine:
    """The samples of a quarantine file, by source."""

    def __init__(self, entries: Iterable[Quarantined] = (), path: str = ""):
        self.path = path
        self.entries: dict[str, dict[int, Quarantined]] = {}
        for entry in entries:
            self.entries.setdefault(entry.source, {})[entry.index] = entry

    def __len__(self) -> int:
        return sum(len(found) for found in self.entries.values())

    @classmethod
    def read(cls, path: str) -> Quarantine:
        """Raises DataError that names the line."""
        lines = read_lines(path)
        return cls((_entry(line, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip()), path)

    def write(self, path: str | Path) -> Path:
        """All samples, by source and number."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [found[i] for found in self.entries.values() for i in sorted(found)]
        text = "".join(json.dumps(row.dump(), ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    def known(self, names: Iterable[str]) -> None:
        """Raise ConfigError where a source of the file is none of the run's."""
        names = list(names)
        for name in self.entries:
            if name not in names:
                raise ConfigError(f"quarantine file {self.path}: unknown data source {name!r}; {nearest(name, names)}")

    def held_out(self) -> Quarantine:
        """The samples of held-out sources, whose names in the file begin with ``held_out/``, by their own names."""
        rows = [
            replace(row, source=name[len(HELD_OUT) :])
            for name in self.entries
            for row in self.entries[name].values()
            if name.startswith(HELD_OUT)
        ]
        return Quarantine(rows, self.path)

    def of(self, name: str, source: Source) -> frozenset[int]:
        """The numbers that a source leaves out. Raises DataError where the file belongs to other data."""
        found = self.entries.get(name, {})
        for index, entry in found.items():
            if index >= len(source):
                raise DataError(
                    f"quarantine file {self.path}: sample {entry.id!r} is number {index} of {name!r}, which has "
                    f"{len(source)}; the data changed: run chiasm check again"
                )
            try:
                id = source[index].id
            except DataError:
                continue  # it cannot be opened, which is why it is here
            if id != entry.id:
                raise DataError(
                    f"quarantine file {self.path}: number {index} of {name!r} was {entry.id!r} and is now {id!r}; "
                    "the data changed: run chiasm check again"
                )
        return frozenset(found)


def _entry(line: str, where: str) -> Quarantined:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: {error.msg}; it is not JSON") from None
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is {type(record).__name__}, a table was expected")
    for key in record:
        if key not in KEYS:
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    if not isinstance(record.get("source"), str) or not isinstance(record.get("index"), int) or record["index"] < 0:
        raise DataError(f"{where}: needs source (a name) and index (a number from 0), got {line.strip()[:80]}")
    texts = [str(record.get(key, "")) for key in ("id", "reason", "message")]
    return Quarantined(record["source"], record["index"], *texts)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that a kill may have cut."""
    return [json.loads(line) for line in read_text(path).split("\n")[:-1]]


# ------------------------------------------------------------------------------------------------------- on the way


class BadSamples(Config):
    """What a run does with a sample that it cannot use: ``stop``, or ``skip`` it and stop above ``cap``.

    ``cap`` is a number of samples, or below 1 a share of an epoch's samples.
    """

    do: Literal["stop", "skip"] = "stop"
    cap: int | float = Field(default=0.001, ge=0)

    def most(self, samples: int) -> int:
        """How many samples may be skipped of an epoch of ``samples``."""
        if self.do == "stop":
            return 0
        return int(self.cap * samples) if 0 < self.cap < 1 else int(self.cap)


BadPolicy = Annotated[BadSamples, BeforeValidator(lambda value: {"do": value} if isinstance(value, str) else value)]


class Skips:
    """The samples that a run skipped, each once, in a file beside its log. Above ``most`` it stops, naming the sample.

    ``resume_at`` keeps what was skipped before that step and forgets the rest, as the log does.
    """

    def __init__(self, path: Path, most: int, resume_at: int | None = None):
        self.path, self.most = path, most
        self.seen: set[tuple[str, int]] = set()
        kept = []
        if resume_at is not None and path.is_file():
            kept = [r for r in _whole_lines(path) if r["step"] <= resume_at]
        self.seen = {(record["source"], record["index"]) for record in kept}
        if path.is_file():  # replaced in one step, so that a kill here forgets nothing
            aside = path.with_name(f".{path.name}")
            aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
            os.replace(aside, path)
            if not kept:
                path.unlink()

    def add(self, step: int, sample: Quarantined, error: DataError) -> None:
        """Count a sample that step ``step`` left out. Raises ``error`` above the cap, with both numbers."""
        if (sample.source, sample.index) in self.seen:
            return
        if len(self.seen) >= self.most:
            told = f" ({len(self.seen)} bad samples were skipped before, {self.most} may be: data.bad)"
            raise DataError(f"{error}{told if self.most else ''}", error.fault)
        self._write(sample.dump() | {"step": step})

    def _write(self, record: Mapping[str, Any]) -> None:
        self.seen.add((record["source"], record["index"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
