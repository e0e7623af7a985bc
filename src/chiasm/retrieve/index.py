"""An index: vectors of the pictures of a folder, and of texts, that can be asked.

    index = Index.open("photos/.chiasm-index", vlm)         # made where it is not there
    index.update_folder("photos")                           # new, changed and deleted files only
    hits = index.search("a red car", k=10)                  # or a picture; among pictures or among texts

The vectors of a model mean nothing to another one, so an index carries the mark of the model and of the processing that
made it, and refuses others with the difference.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.infer import embed
from chiasm.retrieve.catalogue import LAYOUT, Catalogue, Item
from chiasm.retrieve.mark import check_mark, mark
from chiasm.retrieve.vectors import Exact, Faiss, Vectors

FOLDER = ".chiasm-index"
CATALOGUE = "catalogue.sqlite"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"})
SUFFIXES |= {".jfif", ".jpe", ".mpo", ".heic", ".heif", ".jxl"}  # the last three cannot be read, and are told
HOLES = 0.25
"""Share of removed vectors above which the files are written anew without them."""

Engine = Literal["exact", "faiss"]
Kind = Literal["image", "text"]
Found = tuple[list[int], Tensor]  # numbers of the items and their vectors [n, D]
Embedder = Callable[[Sequence[Any], Kind, Callable[[int, str], None]], Iterable[Found]]
"""(items, kind, told of what cannot be read: number and reason) → batches of vectors, in any order."""


@dataclass(frozen=True)
class Hit:
    """One result. ``path`` is the picture's file; None for a text."""

    kind: str
    name: str
    score: float  # cosine
    path: Path | None = None


@dataclass
class Update:
    """What an update did, in numbers of items."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)  # name and reason, of this update
    seconds: float = 0.0


class Index:
    """See the head of this file. ``root`` is the folder whose pictures it holds, once there is one."""

    def __init__(self, folder: str | Path, vlm: Any, engine: Engine | None = None, made_by: str = ""):
        self.folder, self.vlm = Path(folder), vlm
        if not hasattr(vlm.model, "embed_images"):
            raise ConfigError(
                f"a model of type {vlm.config.model.type!r} gives no vectors to compare; index with one of two towers"
            )
        own = mark(vlm)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.catalogue = Catalogue(self.folder / CATALOGUE)
        stored = self.catalogue.fact("mark")
        if stored is None:
            self.catalogue.facts({"layout": LAYOUT, "mark": own, "model": made_by, "engine": engine or "exact"})
            stored = own
        check_mark(vlm, stored, own, self.folder)
        self.dim = int(stored["dim"])
        self.engine: Engine = self.catalogue.fact("engine")
        if engine not in (None, self.engine):
            self.catalogue.facts({"engine": engine})
            self.engine = engine or "exact"
        self.stores: dict[str, Vectors] = {}

    @classmethod
    def open(cls, folder: str | Path, vlm: Any, engine: Engine | None = None, made_by: str = "") -> Index:
        """The index in a folder, made where it is not there. Raises ConfigError for another model's, DataError."""
        return cls(folder, vlm, engine, made_by)

    @property
    def root(self) -> Path | None:
        """The folder whose pictures are indexed."""
        told = self.catalogue.fact("root")
        return None if told is None else (self.folder / told).resolve()

    def close(self) -> None:
        """Let go of the files."""
        self.catalogue.close()

    # ------------------------------------------------------------------------------------------------------ updates

    def update_folder(
        self,
        root: str | Path,
        embedder: Embedder | None = None,
        advance: Callable[[int, int], None] | None = None,
        batch: int = 64,
        workers: int | None = None,
    ) -> Update:
        """Make the index hold the pictures that lie in ``root`` now, in its folders too.

        Files with the size and time of change that they had are not opened. What is done is kept, whenever the process
        ends. ``advance(done, of)`` is told of pictures. Raises DataError for a folder without pictures.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: is no folder; give one that holds pictures")
        held = self.root
        if held is not None and held != root.resolve():
            raise DataError(
                f"{self.folder}: holds the pictures of {held}, not those of {root}; use another --index for them"
            )
        there = dict(pictures(root, self.folder))
        known = self.catalogue.known("image")
        if not there:
            before = f" now, the index {len(known)}; if they are gone for good, remove {self.folder}" if known else ""
            raise DataError(f"{root}: holds 0 pictures{before} ({', '.join(sorted(SUFFIXES))})")
        if held is None:
            self.catalogue.facts({"root": os.path.relpath(root.resolve(), self.folder.resolve())})
        todo = [name for name, state in there.items() if known.get(name) != state]
        gone = [name for name in known if name not in there]
        items = [Item("image", name, *there[name]) for name in todo]
        paths = [str(root / name) for name in todo]
        with self.catalogue.writing():
            update = self._update("image", items, gone, paths, embedder, advance, batch, workers)
        update.kept = len(there) - len(todo)
        return update

    def update_texts(
        self, texts: Iterable[str], embedder: Embedder | None = None, batch: int = 64, workers: int | None = None
    ) -> Update:
        """Make the index hold exactly these texts, for pictures to find. Raises DataError for an empty one."""
        wanted = list(dict.fromkeys(texts))
        empty = [i for i, text in enumerate(wanted) if not text.strip()]
        if empty:
            raise DataError(f"text {empty[0] + 1} of {len(wanted)} is empty; leave it out")
        known = self.catalogue.known("text")
        todo, there = [text for text in wanted if text not in known], set(wanted)
        items = [Item("text", text) for text in todo]
        gone = [text for text in known if text not in there]
        with self.catalogue.writing():
            update = self._update("text", items, gone, todo, embedder, None, batch, workers)
        update.kept = len(wanted) - len(todo)
        return update

    def _update(
        self,
        kind: Kind,
        items: list[Item],
        gone: list[str],
        given: list[str],
        embedder: Embedder | None,
        advance: Callable[[int, int], None] | None,
        batch: int,
        workers: int | None,
    ) -> Update:
        start, update, old = time.perf_counter(), Update(removed=len(gone)), self.catalogue.known(kind)
        with self.catalogue.change():
            self.catalogue.drop(kind, gone)
        store, done = self._exact(kind, cut=True), 0
        bad: list[Item] = []

        def broken(number: int, why: str) -> None:
            item = items[number]
            bad.append(Item(item.kind, item.name, item.size, item.changed, None, why))

        def keep(numbers: Sequence[int], rows: Iterable[int | None]) -> None:
            nonlocal done
            good = [Item(kind, items[n].name, items[n].size, items[n].changed, r) for n, r in zip(numbers, rows)]
            with self.catalogue.change():
                self.catalogue.put([*good, *bad])
            update.broken += [(item.name, item.why or "") for item in bad]
            for item in (*good, *bad):
                update.changed += item.name in old
                update.added += item.name not in old
            done += len(good) + len(bad)
            bad.clear()
            if advance:
                advance(done, len(items))

        run = embedder or self._embedder(batch, workers)
        for numbers, vectors in run(given, kind, broken) if items else ():
            keep(numbers, store.add(vectors))
        keep([], [])  # the broken ones behind the last vector
        self._settle(kind)
        update.seconds = time.perf_counter() - start
        return update

    def _embedder(self, batch: int, workers: int | None) -> Embedder:
        def run(given: Sequence[Any], kind: Kind, broken: Callable[[int, str], None]) -> Iterator[Found]:
            told = lambda number, error: broken(number, str(error))  # noqa: E731
            yield from embed.stream(self.vlm.model, self.vlm.processor, given, kind, batch, workers, told)

        return run

    def _exact(self, kind: str, cut: bool = False) -> Exact:
        """The vectors of a kind as the catalogue counts them now. ``cut``: to write behind them."""
        rows = self.catalogue.rows(kind)
        count = rows[-1] + 1 if rows else 0
        removed = set(range(count)).difference(rows) if len(rows) < count else ()
        return Exact(self.folder, self.catalogue.fact(f"file {kind}") or kind, self.dim, count, sorted(removed), cut)

    def _store(self, kind: str, fresh: bool = False) -> Vectors:
        """The store that is searched; ``fresh``: as it is now."""
        if fresh or kind not in self.stores:
            exact = self._exact(kind)
            self.stores[kind] = Faiss(exact) if self.engine == "faiss" else exact
        return self.stores[kind]

    def _settle(self, kind: str) -> None:
        """Forget vectors that nothing names; where they are many, write the files without them."""
        rows = self.catalogue.rows(kind)
        count = rows[-1] + 1 if rows else 0
        if count - len(rows) > HOLES * count:
            name, old = self.catalogue.fact(f"file {kind}") or kind, self._exact(kind)
            after = f"{kind}.{int(name.partition('.')[2] or 0) + 1}"
            for file in self.folder.glob(f"{after}.*"):
                file.unlink()
            new = Exact(self.folder, after, self.dim, 0, cut=True)
            for vectors, _ in old.blocks():
                new.add(vectors)
            new.save()
            with self.catalogue.change():
                self.catalogue.renumber(kind, rows)
                self.catalogue.facts({f"file {kind}": after})
            for file in self.folder.glob(f"{name}.*"):
                if not file.name.startswith(f"{after}."):
                    file.unlink()
        self._store(kind, fresh=True).save()

    # ------------------------------------------------------------------------------------------------------- search

    def search(self, query: Any, k: int = 10, among: Kind = "image") -> list[Hit]:
        """The ``k`` items nearest to a text (a string) or a picture (a path, PIL image, bytes, array).

        A string is always a text; ``Path(...)`` is a picture. Raises DataError for an empty query or an empty index.
        """
        if k < 1:
            raise DataError(f"k is {k}; ask for at least 1 result")
        if isinstance(query, str) and not query.strip():
            raise DataError("the query is empty; give a text such as 'a red car', or a picture")
        kind: Kind = "text" if isinstance(query, str) else "image"
        items = [str(query)] if isinstance(query, Path) else [query]
        vector = embed.embed(self.vlm.model, self.vlm.processor, **{f"{kind}s": items})  # type: ignore[arg-type]
        return self.nearest(vector, k, among)[0]

    def nearest(self, vectors: Tensor, k: int = 10, among: Kind = "image") -> list[list[Hit]]:
        """The ``k`` items nearest to each of ``vectors [q, D]``."""
        store = self._store(among)
        if not len(store):
            counts = self.catalogue.counts()
            held = ", ".join(f"{good} {kind}s" for kind, (good, _) in counts.items()) or "nothing"
            more = "; texts are indexed with --texts FILE" if among == "text" else ""
            raise DataError(f"{self.folder}: holds no {among}s to search among, it holds {held}{more}")
        scores, rows = store.search(vectors, k)
        items = self.catalogue.at(among, sorted({r for r in rows.flatten().tolist() if r >= 0}))
        root = self.root
        results = []
        for row_scores, row in zip(scores.tolist(), rows.tolist(), strict=True):
            found = [(items[r], s) for r, s in zip(row, row_scores, strict=True) if r in items]
            results.append(
                [
                    Hit(among, i.name, s, root / i.name if root is not None and among == "image" else None)
                    for i, s in found
                ]
            )
        return results

    def remove(self) -> None:
        """Delete the index from the disk."""
        self.close()
        shutil.rmtree(self.folder)


def pictures(root: Path, index: Path | None = None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names (with ``/``) of the picture files in a folder and its folders, each with its size and time of change.

    Hidden files and folders, and the index itself, are left out. Links to folders are not followed.
    """
    own = index.resolve() if index is not None else None
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (here / f).resolve() != own)
        for file in sorted(files):
            path = here / file
            if file.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            name = path.relative_to(root).as_posix()
            try:
                name.encode()
                state = path.stat()
            except (OSError, UnicodeError):  # a link to nothing, a file that went, a name that cannot be written down
                yield name.encode("utf-8", "backslashreplace").decode(), (-1, 0)
                continue
            yield name, (state.st_size, state.st_mtime_ns)
