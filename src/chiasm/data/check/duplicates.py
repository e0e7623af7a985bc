"""What is there twice: ids, samples, and pictures under two names."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.data.check.kinds import Finding
from chiasm.data.mixture import Mixture
from chiasm.data.quarantine import HELD_OUT
from chiasm.data.shuffle import media_of
from chiasm.errors import DataError
from chiasm.types import Image


def twice(mixture: Mixture, rows: list[np.ndarray], pictures: list[np.ndarray]) -> Iterator[Finding]:
    """Findings about repeats, of which the first in the order of the sources is no finding. One array a source."""
    for source, name in enumerate(mixture.names):
        for kind, column in (("duplicate_id", "id"), ("duplicate_sample", "content")):
            for index, first in _repeats(rows[source][column]):
                id, before = mixture[source, index].id, mixture[source, first].id
                told = "has the id of" if kind == "duplicate_id" else f"says and shows the same as sample {before!r},"
                yield Finding(name, index, id, kind, f"sample {id!r}, number {index}: {told} number {first}")
    yield from _leaks(mixture, rows)
    yield from _pictures(mixture, pictures)


def _leaks(mixture: Mixture, rows: list[np.ndarray]) -> Iterator[Finding]:
    """Held-out samples that say and show what a training sample does: their scores are worth nothing."""
    trained = [n for n, name in enumerate(mixture.names) if not name.startswith(HELD_OUT)]
    contents = np.concatenate([np.zeros(1, "u8"), *(rows[n]["content"] for n in trained)])[1:]
    owners = np.repeat(trained, [len(rows[n]) for n in trained])
    order = np.argsort(contents, kind="stable")
    for source, name in enumerate(mixture.names):
        if source in trained or not len(contents):
            continue
        mine = rows[source]["content"]
        at = np.minimum(np.searchsorted(contents[order], mine), len(contents) - 1)
        for index in np.flatnonzero((contents[order][at] == mine) & (mine != 0)).tolist():
            where = int(order[at[index]])
            owner = int(owners[where])
            number = where - sum(len(rows[n]) for n in trained if n < owner)
            id = mixture[source, index].id
            told = f"sample {id!r} of {name}: says and shows the same as number {number} of {mixture.names[owner]}"
            yield Finding(name, index, id, "leaked", told)


def _repeats(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place, place of the first) of each value that was there before. A 0 stands for no value."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = 0
    for at in range(1, len(ranked)):
        if ranked[at] != ranked[first]:
            first = at
        elif ranked[at]:
            yield int(order[at]), int(order[first])


def _pictures(mixture: Mixture, pictures: list[np.ndarray]) -> Iterator[Finding]:
    """The same content under another name. Content is compared in full only where size and first bytes agree."""
    owners = np.repeat(np.arange(len(pictures)), [len(found) for found in pictures])
    found = np.concatenate(pictures)
    order = np.argsort(found["content"], kind="stable")
    _, starts, counts = np.unique(found["content"][order], return_index=True, return_counts=True)
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        group = order[start : start + count]
        if len(np.unique(found["name"][group])) < 2:
            continue
        seen: dict[Any, tuple[int, int, int]] = {}
        names: set[int] = set()
        for at in sorted(group.tolist()):
            if not found["exact"][at] and int(found["name"][at]) in names:
                continue  # the same file, used by another sample
            names.add(int(found["name"][at]))
            place = (int(owners[at]), int(found["index"][at]), int(found["number"][at]))
            content = b"" if found["exact"][at] else _all(mixture, *place)
            if content is None:
                continue
            before = seen.setdefault((bool(found["exact"][at]), content), place)
            if before != place:
                yield _same(mixture, place, before)


def _all(mixture: Mixture, source: int, index: int, number: int) -> bytes | None:
    """A hash of all bytes of a picture's file."""
    try:
        data = _picture(mixture, source, index, number)
        digest = blake2b(digest_size=16)
        with Path(data).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.digest()
    except (OSError, DataError):
        return None  # it changed while it was looked at


def _picture(mixture: Mixture, source: int, index: int, number: int) -> Any:
    return [m.data for m in media_of(mixture[source, index]) if isinstance(m, Image)][number]


def _same(mixture: Mixture, place: tuple[int, int, int], before: tuple[int, int, int]) -> Finding:
    source, index, number = place
    example, other = mixture[source, index], mixture[before[0], before[1]]
    names = [_picture(mixture, *p) for p in (place, before)]
    mine, theirs = (f" {str(n)!r}" if isinstance(n, (str, Path)) and len(str(n)) < 300 else "" for n in names)
    told = (
        f"sample {example.id!r}: picture {number + 1}{mine} is picture {before[2] + 1}{theirs} of sample {other.id!r}"
    )
    return Finding(mixture.names[source], index, example.id, "duplicate_picture", told)
