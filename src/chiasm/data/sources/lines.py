"""Records of a JSONL file or a JSON list by number, from an index of byte offsets: memory does not grow with the texts.

A record costs eight bytes; it is read and parsed when it is asked for. The index is made in one pass over the file.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from chiasm.data.base import Source
from chiasm.data.sources.records import Record
from chiasm.errors import DataError

_BLANK = re.compile(r"[ \t\n\r]*")
CHUNK = 1 << 20  # bytes read at a time while the index of a JSON list is made


class Records:
    """The tables of a JSONL file (one a line; ``.jsonl``) or of a JSON list, by number.

    A record that is not JSON is an error where it is asked for; a list that is not JSON is one when it is opened, since
    what follows the fault cannot be told apart. Copies in other processes open the file for themselves.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: BinaryIO | None = None
        self.lines: array[int] | None = array("q") if Path(path).suffix == ".jsonl" else None
        self.offsets = array("q")  # where each record begins; in a list, also where it ends
        try:
            with open(path, "rb") as file:
                self.stamp = _stamp(file.fileno())
                if self.lines is None:
                    self.offsets.extend(_elements(file, path))
                else:
                    self._scan(file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self.offsets) // (1 if self.lines is not None else 2)

    def __getitem__(self, index: int) -> Record:
        """The record. Raises DataError that names the line, or the number in the list."""
        where = f"record {index + 1}" if self.lines is None else f"line {self.lines[index]}"
        try:
            record = json.loads(self.raw(index).rstrip().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {where}: {error}; it is not UTF-8", "record") from None
        except json.JSONDecodeError as error:
            message = f"{self.path}: {where}, column {error.colno}: {error.msg}; it is not JSON"
            raise DataError(message, "record") from None
        if not isinstance(record, Mapping):
            kind = type(record).__name__
            raise DataError(f"{self.path}: {where} is {kind}, a table was expected", "record")
        return record

    def raw(self, index: int) -> bytes:
        """The bytes of a record, not parsed. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        if self.lines is None:
            begin, end = self.offsets[2 * index], self.offsets[2 * index + 1]
        else:
            begin = self.offsets[index]
            end = self.offsets[index + 1] if index + 1 < len(self) else self.stamp[0]
        return self._read(begin, end - begin)

    def _scan(self, file: Any) -> None:
        assert self.lines is not None
        place = 0
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                self.offsets.append(place)
                self.lines.append(number)
            place += len(line)

    def _read(self, begin: int, size: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed with this object
            if _stamp(self._file.fileno()) != self.stamp:
                raise DataError(
                    f"{self.path}: changed since it was opened; start again, so that its index is made anew"
                )
        return os.pread(self._file.fileno(), size, begin)  # moves no shared position: safe after a fork

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


class RecordSource(Source):
    """A source whose examples are records of one file, its configuration's ``file``, each parsed when it is used."""

    quick = True
    marks: tuple[bytes, ...] = (b"<image>", b"<video>")  # what stands in a record once for each of its media

    def __init__(self, config: Any):
        super().__init__(config)
        self.records = Records(config.file)

    def __len__(self) -> int:
        return len(self.records)

    def hint(self, index: int) -> int:
        """Bytes of the record, and a flat amount for each medium."""
        raw = self.records.raw(index)
        return len(raw) + 512 * sum(raw.count(mark) for mark in self.marks)

    def where(self, index: int, record: Record) -> tuple[str, str]:
        """A record's id (its number where it has none), and what errors call it."""
        id = str(record.get("id", index))
        return id, f"{self.config.file}, sample {id!r}"

    def id_of(self, index: int) -> str:
        """A record's id, also where the rest of it cannot be used; its number where it cannot be read."""
        try:
            return self.where(index, self.records[index])[0]
        except DataError:
            return str(index)


def _stamp(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _elements(file: BinaryIO, path: str) -> Iterator[int]:
    """Begin and end, in bytes, of each element of the JSON list in ``file``, of which one window is in memory."""
    window = _Window(file, path)
    if window.mark() != "[":
        raise DataError(f"{path}: a list of records was expected; it opens with {window.mark()!r}", "record")
    window.skip(1)
    if window.mark() == "]":
        return
    while True:
        window.mark()
        yield window.place
        window.element()
        yield window.place
        if window.mark() == "]":
            return
        if window.mark() != ",":
            raise window.error("a comma or the end of the list was expected", 0)
        window.skip(1)


class _Window:
    """The part of a UTF-8 file that is being read, and the byte that it has come to."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.text, self.at, self.place = "", 0, 0
        self.rest, self.ended = b"", False
        self.decoder = json.JSONDecoder()

    def mark(self) -> str:
        """The next character that is not white space, or nothing at the end of the file."""
        while True:
            self.skip(_BLANK.match(self.text, self.at).end() - self.at)  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.fill()

    def skip(self, count: int) -> None:
        """Go on by so many characters."""
        self.place += len(self.text[self.at : self.at + count].encode())
        self.at += count

    def element(self) -> None:
        """Go on to the end of the value that begins here. Raises DataError."""
        while True:
            try:
                _, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number at the very end might go on
                    return self.skip(end - self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos - self.at) from None
            self.fill()

    def fill(self) -> None:
        """Read on. What was gone past is dropped; the window doubles while one value does not fit in it."""
        self.text, self.at = self.text[self.at :], 0
        data = self.rest + self.file.read(max(CHUNK, len(self.text)))
        self.ended = len(data) == len(self.rest)
        cut = len(data)
        if not self.ended:  # the chunk may end inside a character
            while cut > 0 and len(data) - cut < 3 and data[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            if cut > 0 and data[cut - 1] >= 0xC0:
                cut -= 1
        try:
            self.text += data[:cut].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {error}; it is not UTF-8", "record") from None
        self.rest = data[cut:]

    def error(self, what: str, ahead: int) -> DataError:
        """An error ``ahead`` characters from here, with its line and column in the file."""
        place = self.place + len(self.text[self.at : self.at + ahead].encode())
        with open(self.path, "rb") as file:
            lines = file.read(place).decode("utf-8", "replace").split("\n")
        return DataError(
            f"{self.path}: line {len(lines)}, column {len(lines[-1]) + 1}: {what}; it is not JSON", "record"
        )
