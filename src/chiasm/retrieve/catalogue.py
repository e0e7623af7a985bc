"""What the vectors belong to, in SQLite: items with their files, what could not be read, and the mark of the model.

A change is there with its commit or not at all. Vectors are written before the rows that name them are committed, so a
killed run leaves vectors that nothing names, which the next one overwrites, and never a name without its vector.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import DataError

LAYOUT = 1
TABLES = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    kind TEXT NOT NULL, name TEXT NOT NULL, size INTEGER, changed INTEGER,
    place INTEGER, why TEXT, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS places ON items (kind, place) WHERE place IS NOT NULL;
"""


@dataclass(frozen=True)
class Item:
    """A picture (``name``: its path in the indexed folder) or a text (``name``: itself).

    ``size`` (bytes) and ``changed`` (nanoseconds) are those of the file when it was read. ``row`` is that of its
    vector; None where it could not be read, and ``why`` says so then.
    """

    kind: str
    name: str
    size: int = 0
    changed: int = 0
    row: int | None = None
    why: str | None = None


class Catalogue:
    """The items of an index. One writer at a time; readers see the last commit."""

    def __init__(self, path: Path):
        self.path = path
        self.base = sqlite3.connect(path, timeout=2.0, isolation_level=None)
        try:
            self.base.execute("PRAGMA journal_mode=WAL")
            self.base.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: cannot be read ({error}); remove the index's folder and index again") from None
        found = self.fact("layout")
        if found not in (None, LAYOUT):
            raise DataError(f"{path}: has layout {found}, this version of chiasm reads {LAYOUT}; index again")

    def close(self) -> None:
        """Let go of the file."""
        self.base.close()

    # -------------------------------------------------------------------------------------------------------- facts

    def fact(self, key: str) -> Any:
        """A stored value, or None."""
        row = self.base.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def facts(self, values: Mapping[str, Any]) -> None:
        """Store values."""
        pairs = [(key, json.dumps(value)) for key, value in values.items()]
        self.base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", pairs)

    # -------------------------------------------------------------------------------------------------------- items

    def known(self, kind: str) -> dict[str, tuple[int, int]]:
        """Size and time of change of every item of a kind, by name."""
        rows = self.base.execute("SELECT name, size, changed FROM items WHERE kind = ?", (kind,))
        return {name: (size, changed) for name, size, changed in rows}

    def broken(self, kind: str = "image") -> Iterator[Item]:
        """The items that could not be read."""
        yield from self._items("kind = ? AND place IS NULL ORDER BY name", (kind,))

    def at(self, kind: str, rows: Sequence[int]) -> dict[int, Item]:
        """The items of some vectors, by row."""
        marks = ",".join("?" * len(rows))
        found = self._items(f"kind = ? AND place IN ({marks})", (kind, *rows))
        return {item.row: item for item in found if item.row is not None}

    def rows(self, kind: str) -> list[int]:
        """The rows of all vectors that belong to something, ascending."""
        found = self.base.execute(
            "SELECT place FROM items WHERE kind = ? AND place IS NOT NULL ORDER BY place", (kind,)
        )
        return [row for (row,) in found]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Items with a vector and items without, of each kind."""
        found = self.base.execute("SELECT kind, COUNT(place), COUNT(*) FROM items GROUP BY kind")
        return {kind: (good, every - good) for kind, good, every in found}

    def put(self, items: Iterable[Item]) -> None:
        """Enter items, in the place of those of the same name."""
        values = [(i.kind, i.name, i.size, i.changed, i.row, i.why) for i in items]
        self.base.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)", values)

    def drop(self, kind: str, names: Iterable[str]) -> None:
        """Forget items."""
        self.base.executemany("DELETE FROM items WHERE kind = ? AND name = ?", [(kind, name) for name in names])

    def renumber(self, kind: str, rows: Sequence[int]) -> None:
        """Row ``rows[i]`` becomes row ``i``; ``rows`` are all of the kind's, ascending."""
        pairs = [(-1 - new, kind, old) for new, old in enumerate(rows)]  # below 0 meanwhile: no two ever meet
        self.base.executemany("UPDATE items SET place = ? WHERE kind = ? AND place = ?", pairs)
        self.base.execute("UPDATE items SET place = -1 - place WHERE kind = ? AND place < 0", (kind,))

    @contextmanager
    def change(self) -> Iterator[None]:
        """What is done inside is there when it ends, or not at all where it raises."""
        self.base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.base.execute("ROLLBACK")
            raise
        self.base.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the index for one writer. Raises DataError where another process has it; a killed one lets go."""
        lock = sqlite3.connect(self.path.with_name("lock.sqlite"), timeout=0.2, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            lock.close()
            raise DataError(
                f"{self.path.parent}: another process is changing this index; wait until it is done"
            ) from None
        try:
            yield
        finally:
            lock.close()

    def _items(self, where: str, values: tuple[Any, ...]) -> Iterator[Item]:
        for row in self.base.execute(f"SELECT kind, name, size, changed, place, why FROM items WHERE {where}", values):
            yield Item(*row)
