"""Image–text pairs in tar archives, in the layout of webdataset: members that share a name up to its first dot.

``000017.jpg`` with ``000017.txt`` or ``000017.json``. The archives are read in place through an index of byte offsets
that one pass over their headers makes: no library is needed, and a random order costs one seek a sample.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.data.base import Example, Source
from chiasm.data.sources.rows import Columns, RowsConfig, example_of, files
from chiasm.errors import ConfigError, DataError
from chiasm.registry import register

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class WebDatasetConfig(RowsConfig):
    """``file`` is a path or a glob pattern of uncompressed tars.

    A sample's columns are ``picture`` (the bytes of its picture), ``txt`` (its text), the keys of its ``json``, and
    ``__key__``. ``index`` names a file that keeps the index from one run to the next.
    """

    type: str = "webdataset"
    file: str
    columns: Columns = Columns(id="__key__", answer="txt", images="picture")
    index: str | None = None


@register("source", "webdataset")
class WebDataset(Source):
    """Samples of tars by number, in the order of the archives. About 50 bytes of memory a sample."""

    Config = WebDatasetConfig

    def __init__(self, config: WebDatasetConfig):
        super().__init__(config)
        self.paths = files(config.file)
        self._files: dict[int, Any] = {}
        stamp = [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in self.paths]
        found = _kept(config.index, stamp) or _indexed(self.paths)
        self.keys, self.key_ends, self.first, self.members, self.kinds = found
        if config.index is not None:
            _keep(config.index, stamp, found)

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.file}: sample {index} of {len(self)}")
        shard = int(self.members[self.first[index]]["shard"])
        return example_of(self._row(index), index, self.config, self.paths[shard])

    def id_of(self, index: int) -> str:
        """A sample's key."""
        return bytes(self.keys[self.key_ends[index] : self.key_ends[index + 1]]).decode()

    def hint(self, index: int) -> int:
        """Bytes of its texts, and a flat amount for each picture."""
        mine = self.members[self.first[index] : self.first[index + 1]]
        picture = np.isin(mine["kind"], [n for n, kind in enumerate(self.kinds) if kind in PICTURES])
        return int(mine["size"][~picture].sum()) + 512 * int(picture.sum())

    def _row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"__key__": self.id_of(index)}
        pictures = []
        for member in self.members[self.first[index] : self.first[index + 1]]:
            kind = self.kinds[int(member["kind"])]
            last = kind.rsplit(".", 1)[-1]
            if last in PICTURES:
                pictures.append(self._read(member))
            elif last == "txt":
                row[kind] = self._text(member, row["__key__"], kind)
            elif last == "json":
                row |= self._json(member, row["__key__"], kind)
        if pictures:
            row["picture"] = pictures[0] if len(pictures) == 1 else pictures
        where = f"{self.paths[int(self.members[self.first[index]]['shard'])]}, sample {row['__key__']!r}"
        for key, name in self.config.columns.dump().items():
            if name is not None and name not in row and key not in ("answers", "system", "videos"):
                have = ", ".join(k for k in row if k != "__key__")
                raise DataError(f"{where}: has nothing for columns.{key} = {name!r}; it has {have or 'nothing'}")
        return row

    def _text(self, member: Any, key: str, kind: str) -> str:
        try:
            return self._read(member).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.paths[int(member['shard'])]}, sample {key!r}: {kind}: {error}") from None

    def _json(self, member: Any, key: str, kind: str) -> dict[str, Any]:
        where = f"{self.paths[int(member['shard'])]}, sample {key!r}: {kind}"
        try:
            record = json.loads(self._read(member))
        except ValueError as error:
            raise DataError(f"{where}: {error}; it is not JSON") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: is {type(record).__name__}, a table was expected")
        return record

    def _read(self, member: Any) -> bytes:
        shard = int(member["shard"])
        if shard not in self._files:
            if len(self._files) >= 64:  # open archives of a process
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open(self.paths[shard], "rb")  # noqa: SIM115 - kept open
        data = os.pread(self._files[shard].fileno(), int(member["size"]), int(member["offset"]))
        if len(data) < member["size"]:
            raise DataError(f"{self.paths[shard]}: ends at {len(data)} of {member['size']} bytes; it is cut off")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


MEMBER = np.dtype([("shard", "u4"), ("kind", "u2"), ("offset", "u8"), ("size", "u8")])

Index = tuple[Any, Any, Any, Any, list[str]]


def _indexed(paths: list[str]) -> Index:
    """Keys and their ends, the first member of each sample, the members, and the endings that members have."""
    keys, ends, first = bytearray(), array("q", [0]), array("q")
    columns: list[Any] = [array("L"), array("H"), array("Q"), array("Q")]
    kinds: dict[str, int] = {}
    for shard, path in enumerate(paths):
        before = None
        for name, offset, size in _members(path):
            folder, _, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != before:
                first.append(len(columns[0]))
                keys += key.encode()
                ends.append(len(keys))
                before = key
            for column, value in zip(columns, (shard, kinds.setdefault(kind.lower(), len(kinds)), offset, size)):
                column.append(value)
    first.append(len(columns[0]))
    members = np.empty(len(columns[0]), MEMBER)
    for name, column in zip(("shard", "kind", "offset", "size"), columns, strict=True):
        members[name] = np.asarray(column)
    return np.frombuffer(bytes(keys), "u1"), np.asarray(ends), np.asarray(first), members, list(kinds)


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file of an archive. Raises DataError."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined] # tarfile would keep every header
                if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                    yield member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar archive: {error}; unpack .tar.gz to .tar, since samples "
            "are read at random places"
        ) from None


def _kept(path: str | None, stamp: list[Any]) -> Index | None:
    """The index in a file, where it is that of these archives."""
    if path is None or not Path(path).is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as held:
            about = json.loads(str(held["about"]))
            if about["stamp"] != stamp:
                return None
            return held["keys"], held["ends"], held["first"], held["members"], about["kinds"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"index {path}: is not an index of this package ({error}); remove it") from None


def _keep(path: str, stamp: list[Any], index: Index) -> None:
    keys, ends, first, members, kinds = index
    about = json.dumps({"stamp": stamp, "kinds": kinds})
    aside = Path(f"{path}.{os.getpid()}.npz")
    np.savez(aside, keys=keys, ends=ends, first=first, members=members, about=about)
    aside.replace(path)
