"""What sources of files share: JSON and JSONL read with errors that name the place, and a split by picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from chiasm.config import read_lines, read_text
from chiasm.data.base import SourceConfig
from chiasm.errors import DataError, nearest

Record = Mapping[str, Any]


class SplitConfig(SourceConfig):
    """A source without published splits. ``held_out`` is the share of pictures, chosen by their names, that ``train``
    never sees and ``held_out`` holds; no picture is in both.
    """

    split: Literal["all", "train", "held_out"] = "all"
    held_out: float = Field(default=0.2, gt=0, lt=1)

    def holds(self, picture: str) -> bool:
        """Whether a picture's examples are in the split."""
        if self.split == "all":
            return True
        place = int.from_bytes(hashlib.sha256(picture.encode()).digest()[:4], "big") / 2**32
        return (place < self.held_out) == (self.split == "held_out")


def read_json(path: str) -> Any:
    """A JSON file. Raises DataError that names the file, the line and the column."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; it is not JSON") from None


def read_records(path: str) -> list[Record]:
    """The tables of a JSON list or of a JSONL file (one table a line). Raises DataError."""
    if Path(path).suffix != ".jsonl":
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path}: holds {type(records).__name__}, a list of records was expected")
    else:
        records = []
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}: line {number}, column {error.colno}: {error.msg}; it is not JSON"
                    ) from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"{path}: record {number} is {type(record).__name__}, a table was expected")
    return records


def known_keys(record: Record, known: tuple[str, ...], where: str) -> None:
    """Raise DataError on a key that the source does not read."""
    for key in record:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")


def need(record: Record, key: str, where: str) -> Any:
    """A key's value. Raises DataError where it is missing."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is {type(record).__name__}, a table with {key!r} was expected")
    if key not in record:
        raise DataError(f"{where}: missing key {key!r}; it has {', '.join(map(str, record)) or 'none'}")
    return record[key]


def beside(folder: str, name: Any) -> Any:
    """A picture's path: ``name`` in ``folder`` where it is a relative path, else as it is (URL, data URL, absolute)."""
    if not isinstance(name, str) or not folder or name.startswith("data:") or "://" in name:
        return name
    return str(Path(folder) / name)
