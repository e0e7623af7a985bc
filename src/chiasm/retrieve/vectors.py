"""Vectors on disk and the exact search among them. Four methods, which ``faiss`` stands behind too:

    rows = store.add(vectors)          scores, rows = store.search(queries, k)
    store.remove(rows)                 store.save()

``Exact`` finds the true nearest vectors and reads little for it. Beside each vector of float32 it keeps a copy in 8-bit
numbers, with the length of what the copy lost. A query is first multiplied with the copies, a quarter of the bytes; how
far each product can be from the true one is known, so only vectors that may still be among the best ``k`` are read and
multiplied exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from chiasm.errors import DataError
from chiasm.nn import kernels

BLOCK = 1 << 17
"""Vectors that are multiplied with queries at once."""

FEW = 32
"""Queries up to which the 8-bit copies save more reading than they cost."""

READ = 8192
"""Vectors that are multiplied exactly at once."""


class Vectors(Protocol):
    """A store of unit vectors by row number. Rows that were removed are never found again, and never used again."""

    def add(self, vectors: Tensor) -> range:
        """Append ``[n, D]``; the rows they have from now on."""
        ...

    def remove(self, rows: Sequence[int]) -> None:
        """Forget these rows."""
        ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """``queries [q, D]`` → cosines ``[q, k']``, best first, and their rows; ``k'`` is ``k``, or how many there are.

        Of equal cosines the lower row comes first.
        """
        ...

    def save(self) -> None:
        """Everything on disk."""
        ...

    def __len__(self) -> int:
        """Rows that can be found."""
        ...


class Exact:
    """Vectors in flat files: ``NAME.f32`` the vectors, ``NAME.i8`` their copies, ``NAME.loss`` step and loss of each.

    ``rows`` says how many of them count. What stands behind, of a run that was killed or is writing now, is not looked
    at; ``cut``, for the one that writes, takes it away first.
    """

    def __init__(self, folder: Path, name: str, dim: int, rows: int, removed: Sequence[int] = (), cut: bool = False):
        self.path = folder / name
        self.dim, self.rows = dim, rows
        self.removed = set(removed)
        self.sizes = {".f32": 4 * dim, ".i8": dim, ".loss": 8}  # bytes a row
        for suffix, size in self.sizes.items():
            file = self._file(suffix)
            held = file.stat().st_size if file.is_file() else 0
            if held < rows * size:
                raise DataError(
                    f"{file}: holds {held // size} vectors, the catalogue counts {rows}; the index is damaged: remove "
                    "its folder and index again"
                )
            if cut:
                file.touch()
                os.truncate(file, rows * size)
        self._open()

    # ------------------------------------------------------------------------------------------------------ changes

    def add(self, vectors: Tensor) -> range:
        """See ``Vectors``."""
        vectors = vectors.to("cpu", torch.float32).contiguous()  # [n, D]
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise DataError(f"vectors of shape {tuple(vectors.shape)} do not fit an index of width {self.dim}")
        codes, step, loss = narrowed(vectors)
        for suffix, values in ((".f32", vectors), (".i8", codes), (".loss", torch.stack([step, loss], 1))):
            with self._file(suffix).open("ab") as file:
                file.write(values.contiguous().numpy().tobytes())
        added = range(self.rows, self.rows + len(vectors))
        self.rows += len(vectors)
        self.stale = True
        return added

    def remove(self, rows: Sequence[int]) -> None:
        """See ``Vectors``."""
        self.removed.update(rows)
        self.stale = True

    def save(self) -> None:
        """Wait until the disk has it."""
        for suffix in self.sizes if self.rows else ():
            with self._file(suffix).open("rb+") as file:
                os.fsync(file.fileno())

    def __len__(self) -> int:
        return self.rows - len(self.removed)

    # ------------------------------------------------------------------------------------------------------- search

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Vectors``. Exact: what sorting all products of ``cosines`` gives."""
        if self.stale:
            self._open()
        queries = queries.to("cpu", torch.float32)  # [q, D]
        k = min(k, len(self))
        best = torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), -1)
        if k == 0:
            return best
        look = self._few if len(queries) <= FEW else self._many
        for start in range(0, self.rows, BLOCK):
            span = slice(start, min(start + BLOCK, self.rows))
            for i, (scores, rows) in enumerate(look(queries, span, k, best[0][:, -1].tolist())):
                best[0][i], best[1][i] = merged(best[0][i], best[1][i], scores, rows, k)
        return best

    def _few(self, queries: Tensor, span: slice, k: int, least: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each query the cosines and rows of those in a block that may be among its best ``k``, by the copies.

        ``least``: what each query's ``k``-th best has so far; a row that stays below is none of them.
        """
        codes, step, loss = narrowed(queries)  # [q, D], [q], [q]
        products = kernels.products(self.codes[span], codes)  # [q, block]
        steps, losses = self.losses[span].unbind(1)  # [block] each
        worst = losses.max()
        # |q·x - q'·x'| ≤ |q| |x - x'| + |x'| |q - q'|, and |x'| ≤ |x| + |x - x'|; a little more for rounding.
        rooms = worst * queries.norm(dim=1) + (1.0 + worst) * loss + self._rounding() + 1e-5  # [q]
        for i, query in enumerate(queries):
            about = self._visible(products[i] * steps, span)  # [block], in units of ``step``
            first, bar = about.topk(min(k, len(about))), least[i]
            if len(first.values) == k and float(first.values[-1]) > -torch.inf:  # k real ones: what is below all of
                bar = max(bar, float((self.vectors[span][first.indices] @ query).min()))  # them is not among the best
            lowest = max((bar - float(rooms[i])) / float(step[i]), torch.finfo(torch.float32).min)
            yield self._exact(query, (about >= lowest).nonzero()[:, 0] + span.start)

    def _many(self, queries: Tensor, span: slice, k: int, least: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same by one product in float32: those that rounding may have put in another place are looked at again."""
        for start in range(0, len(queries), 256):
            some = queries[start : start + 256]
            scores = self._visible(some @ self.vectors[span].T, span)  # [q, block]
            bars = torch.tensor(least[start : start + 256])  # [q]
            if scores.shape[1] >= k:
                bars = torch.maximum(bars, scores.topk(k).values[:, -1])
            lowest = (bars - 2 * self._rounding() * some.norm(dim=1)).clamp_min(torch.finfo(torch.float32).min)  # [q]
            where, rows = (scores >= lowest.unsqueeze(1)).nonzero().unbind(1)  # [c] each
            counts = torch.bincount(where, minlength=len(some)).tolist()
            for query, mine in zip(some, rows.split(counts), strict=True):
                yield self._exact(query, mine + span.start)

    def _exact(self, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines of some rows ``[c]``, and the rows."""
        parts = [cosines(self.vectors[some], query) for some in rows.split(READ)]
        return torch.cat(parts) if parts else torch.empty(0), rows

    def _visible(self, scores: Tensor, span: slice) -> Tensor:
        """``scores [..., block]`` with -infinity where rows were removed."""
        if self.removed:
            scores[..., self.hidden[span]] = -torch.inf
        return scores

    def _rounding(self) -> float:
        """How far the product of two unit vectors in float32 can be from the true one, whatever the order of adding."""
        return self.dim * 2.0**-24

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
        """All vectors that were not removed, ``[n, D]``, with their rows ``[n]``, some at a time."""
        if self.stale:
            self._open()
        for start in range(0, self.rows, size):
            rows = torch.arange(start, min(start + size, self.rows))
            rows = rows[~self.hidden[rows]]
            yield self.vectors[rows], rows

    def _open(self) -> None:
        """Map the files; nothing is read before it is needed."""

        def mapped(suffix: str, kind: str, width: int) -> Tensor:
            if not self.rows:
                return torch.from_numpy(np.zeros((0, width), kind))
            return torch.from_numpy(np.memmap(self._file(suffix), kind, "c", shape=(self.rows, width)))

        self.vectors = mapped(".f32", "float32", self.dim)  # [rows, D]
        self.codes = mapped(".i8", "int8", self.dim)  # [rows, D]
        self.losses = mapped(".loss", "float32", 2)  # [rows, 2]
        self.hidden = torch.zeros(self.rows, dtype=torch.bool)  # [rows]
        self.hidden[sorted(self.removed)] = True
        self.stale = False

    def _file(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)


def narrowed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x [n, D]`` → 8-bit numbers ``[n, D]``, the step ``[n]`` that they count in, the length ``[n]`` of the rest."""
    step = x.abs().amax(1).clamp_min(1e-12) / 127  # [n]
    codes = (x / step.unsqueeze(1)).round()
    loss = (x - codes * step.unsqueeze(1)).norm(dim=1)  # [n]
    return codes.to(torch.int8), step, loss


def cosines(x: Tensor, query: Tensor) -> Tensor:
    """``x [n, D]``, ``query [D]`` → ``[n]`` in float32, added in float64: equal vectors have equal cosines."""
    return (x.double() * query.double()).sum(1).float()


def merged(scores: Tensor, rows: Tensor, more: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best ``k`` of two lists, the lower row first among equals."""
    both, where = torch.cat([scores, more]), torch.cat([rows, others])
    order = torch.argsort(where, stable=True)
    order = order[torch.argsort(both[order], descending=True, stable=True)][:k]
    return both[order], where[order]


# ------------------------------------------------------------------------------------------------------------- faiss


class Faiss:
    """Approximate search by ``faiss`` (extra ``index``), for more vectors than exact search is quick enough for.

    The vectors themselves stay in an ``Exact`` store, which the structure is made from again where it does not fit.
    Cosines are those of the exact vectors. ``factory`` is faiss's description of the structure; None: lists of
    neighbours (IVF), about four times the square root of the vectors.
    """

    PROBED = 32  # lists that a query looks into

    def __init__(self, store: Exact, factory: str | None = None):
        try:
            import faiss
        except ImportError:
            raise DataError(
                "an index with engine faiss needs the package faiss: pip install 'chiasm[index]', or use --engine exact"
            ) from None
        self.faiss, self.store, self.factory = faiss, store, factory
        self.file = store.path.with_name(store.path.name + ".faiss")
        self.stamp = store.path.with_name(store.path.name + ".faiss.json")
        self.made = self._read()

    def add(self, vectors: Tensor) -> range:
        """See ``Vectors``. They are found after the next ``save``."""
        return self.store.add(vectors)

    def remove(self, rows: Sequence[int]) -> None:
        """See ``Vectors``."""
        self.store.remove(rows)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Vectors``. Rows that no list held are -1, with a cosine of -infinity."""
        if self.made is None:
            self.save()
        queries = queries.to("cpu", torch.float32).contiguous()
        k = min(k, len(self))
        if k == 0:
            return torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long)
        _, rows = self.made.search(queries.numpy(), min(len(self) + len(self.store.removed), 2 * k + 8))
        found = torch.from_numpy(rows)  # [q, more]
        hidden = torch.zeros(self.store.rows + 1, dtype=torch.bool)
        hidden[sorted(self.store.removed)] = True
        hidden[-1] = True  # row -1: no more were found
        scores = torch.einsum("qd,qmd->qm", queries, self.store.vectors[found.clamp_min(0)])  # [q, more]
        scores = scores.masked_fill(hidden[found], -torch.inf)
        best = scores.topk(k)
        where = found.gather(1, best.indices)
        return best.values, where.masked_fill(best.values == -torch.inf, -1)

    def save(self) -> None:
        """Make the structure from all vectors and write it."""
        self.store.save()
        count = len(self.store)
        if not count:
            return
        lists = max(1, min(int(4 * count**0.5), count // 40))
        made = self.faiss.index_factory(
            self.store.dim,
            self.factory or (f"IVF{lists},Flat" if lists > 1 else "Flat"),
            self.faiss.METRIC_INNER_PRODUCT,
        )
        made = self.faiss.IndexIDMap2(made) if self.factory or lists == 1 else made
        inner = made.index if hasattr(made, "index") else made
        if not inner.is_trained:
            sample = torch.cat([v[:: max(1, count // (64 * lists))] for v, _ in self.store.blocks()])
            inner.train(sample.contiguous().numpy())
        for vectors, rows in self.store.blocks():
            made.add_with_ids(vectors.contiguous().numpy(), rows.numpy().astype("int64"))
        aside = self.file.with_suffix(".aside")
        self.faiss.write_index(made, str(aside))
        os.replace(aside, self.file)
        self.stamp.write_text(json.dumps(self._state()))
        self.made = self._read()

    def __len__(self) -> int:
        return len(self.store)

    def _state(self) -> dict[str, object]:
        return {"rows": self.store.rows, "name": self.store.path.name, "factory": self.factory}

    def _read(self) -> Any:
        """The structure on disk, if it holds the store's rows. Rows removed since then are left out when searching."""
        if not self.file.is_file() or not self.stamp.is_file() or json.loads(self.stamp.read_text()) != self._state():
            return None
        made = self.faiss.read_index(str(self.file))
        if hasattr(made, "nprobe"):
            made.nprobe = self.PROBED
        return made
