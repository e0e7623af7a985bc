"""Features on disk: shards that are only appended to, and beside each an index of what stands where in it.

Each process writes shards of its own and reads all, so that workers and ranks share a folder without locks. Features
are written before the line of the index that names them, and a line counts only when it is whole: whatever is killed,
what the index names is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from chiasm.types import Layout, Tokens

SHARD = 2**30
"""Bytes after which a writer begins another shard."""


class FeatureStore:
    """Features by key. ``limit`` is the number of bytes that all writers together may fill; None: the disk.

    A folder belongs to one encoder (or set of encoders), one type and one processing: its name must say which.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._index: dict[str, tuple[str, dict[str, Any]]] = {}  # key → (shard, its line's entry)
        self._read: dict[str, int] = {}  # index file → bytes read of it
        self._shards: dict[str, np.ndarray] = {}
        self._writer: _Writer | None = None
        self.bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["limit"])  # type: ignore[misc]

    def __len__(self) -> int:
        """Media known to be stored."""
        return len(self._index)

    def layout(self, key: str) -> Layout | None:
        """The layout of a stored medium; None where it is not stored."""
        found = self._find(key)
        if found is None:
            return None
        units, shape, grid, original = found[1]["layout"]
        return Layout(units, tuple(shape), tuple(grid), tuple(original))

    def get(self, key: str) -> dict[str, Tokens] | None:
        """The features of a medium by encoder, ``x [U, N, D]`` each, read from the disk's pages when they are used."""
        found = self._find(key)
        if found is None:
            return None
        shard, entry = found
        return {name: self._tokens(shard, entry["dtype"], *place) for name, place in entry["at"].items()}

    def add(self, media: Sequence[tuple[str, Layout, Mapping[str, Tokens]]]) -> int:
        """Store the features of some media (key, layout, by encoder), all or none of them. Returns how many."""
        media = [item for item in media if item[0] and item[0] not in self._index]
        size = sum(t.x.numel() * t.x.element_size() for _, _, by in media for t in by.values())
        if not media or (self.limit is not None and self.bytes + size > self.limit):
            return 0
        if self._writer is None or self._writer.size > SHARD:
            self._writer = _Writer(self.folder)
        entries = self._writer.write(media)
        for entry in entries:
            self._index[entry["key"]] = (self._writer.name, entry)
        self._read[self._writer.name] = self._writer.index.tell()
        self.bytes += size
        return len(media)

    def refresh(self) -> None:
        """Read what other processes have added to the index."""
        for path in self.folder.glob("*.index"):
            known = self._read.get(path.stem, 0)
            if path.stat().st_size <= known:
                continue
            with path.open("rb") as stream:
                stream.seek(known)
                lines = stream.read().rpartition(b"\n")[0]  # a line that is being written waits for the next time
            for line in lines.splitlines():
                for entry in json.loads(line):
                    self._index[entry["key"]] = (path.stem, entry)
                    self.bytes += entry["bytes"]
            self._read[path.stem] = known + len(lines) + (1 if lines else 0)

    def _find(self, key: str) -> tuple[str, dict[str, Any]] | None:
        if key and key not in self._index:
            self.refresh()
        return self._index.get(key)

    def _tokens(self, shard: str, dtype: str, start: int, shape: list[int], grid: list[int] | None) -> Tokens:
        kind = getattr(torch, dtype)
        size = int(np.prod(shape)) * kind.itemsize
        pages = self._shards.get(shard)
        if pages is None or len(pages) < start + size:  # the shard has grown since
            pages = np.memmap(self.folder / f"{shard}.shard", dtype=np.uint8, mode="c")
            self._shards[shard] = pages
        x = torch.from_numpy(pages[start : start + size]).view(kind).view(shape)  # [U, N, D]
        return Tokens(x, grid=(grid[0], grid[1]) if grid else None)


class _Writer:
    """One shard and its index."""

    def __init__(self, folder: Path):
        self.name = f"{os.getpid()}-{uuid4().hex[:8]}"
        self.shard: BinaryIO = (folder / f"{self.name}.shard").open("ab")
        self.index: BinaryIO = (folder / f"{self.name}.index").open("ab")
        self.size = 0

    def write(self, media: Sequence[tuple[str, Layout, Mapping[str, Tokens]]]) -> list[dict[str, Any]]:
        """Append features, then one line for all of them."""
        entries = []
        for key, layout, by in media:
            at, first = {}, self.size
            for name, tokens in by.items():
                values = _bytes(tokens.x)
                at[name] = (self.size, list(tokens.x.shape), list(tokens.grid) if tokens.grid else None)
                self.shard.write(values)
                self.size += len(values)
                padding = -self.size % 64  # so that every feature begins where its type may be read
                self.shard.write(b"\0" * padding)
                self.size += padding
            dtype = str(next(iter(by.values())).x.dtype).removeprefix("torch.")
            told = [layout.units, list(layout.shape), list(layout.grid), list(layout.original)]
            entries.append({"key": key, "layout": told, "dtype": dtype, "at": at, "bytes": self.size - first})
        self.shard.flush()
        self.index.write(json.dumps(entries).encode() + b"\n")
        self.index.flush()
        return entries


def _bytes(x: Tensor) -> memoryview:
    """The values ``x [...]`` as they stand in memory."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
