"""A whole data set looked at before the first step: on the CPU, in parallel, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chiasm.data.check.duplicates import twice
from chiasm.data.check.examine import PICTURE, ROW, Examiner, Part, Rules, Way
from chiasm.data.check.progress import Progress
from chiasm.data.check.summary import Longest, SourceStats, Summary, source_stats
from chiasm.data.mixture import Mixture
from chiasm.errors import ChiasmError

SIZE = 256  # samples of a part: what a kill may cost, and what a worker holds
AHEAD = 3  # parts that each worker has before it

Span = tuple[int, int, int]  # source, first sample, end


def check_all(
    mixture: Mixture,
    ways: dict[str, Way] | None = None,
    rules: Rules | None = None,
    out: Path | None = None,
    workers: int | None = None,
    fresh: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Summary:
    """Look at every sample of a mixture, up to each source's limit.

    ``ways`` says by source's name how training renders it (without one, no lengths are known); ``out`` is a folder for
    the state that lets a killed check go on (None: none is kept; ``fresh`` begins anew); ``workers`` None takes all
    processors, 0 this process; ``advance(done, of)`` is called after each part. Memory is some 100 bytes a sample.
    """
    begun = time.perf_counter()
    ways, rules = ways or {}, rules or Rules()
    examiner = Examiner(mixture, ways, rules)
    progress = Progress(out / "check-progress.jsonl", _key(mixture, ways, rules), fresh) if out else None
    parts = list(progress.parts) if progress else []
    total, resumed = _total(mixture), sum(len(part.rows) for part in parts)
    done = resumed
    if advance:
        advance(done, total)
    spans = list(_spans(mixture, {(part.source, part.start) for part in parts}))
    for part in _run(examiner, spans, os.cpu_count() or 1 if workers is None else workers):
        if progress:
            progress.add(part)
        parts.append(part)
        done += len(part.rows)
        if advance:
            advance(done, total)
    summary = summarise(mixture, parts, ways, rules)
    if progress:
        progress.close(remove=True)
    return replace(summary, seconds=time.perf_counter() - begun, resumed=resumed)


def summarise(mixture: Mixture, parts: list[Part], ways: dict[str, Way], rules: Rules) -> Summary:
    """The numbers and findings of all parts, with what only shows in the whole."""
    parts = sorted(parts, key=lambda part: (part.source, part.start))
    rows, pictures = [], []
    for number in range(len(mixture.names)):
        mine = [part for part in parts if part.source == number]
        rows.append(np.concatenate([np.zeros(0, ROW), *(part.rows for part in mine)]))
        pictures.append(np.concatenate([np.zeros(0, PICTURE), *(part.pictures for part in mine)]))
    findings = [finding for part in parts for finding in part.findings]
    findings += twice(mixture, rows, pictures)
    order = {name: number for number, name in enumerate(mixture.names)}
    findings.sort(key=lambda f: (order[f.source], f.index))
    stats: list[SourceStats] = []
    for number, name in enumerate(mixture.names):
        limit = ways[name].max_length if name in ways else None
        stats.append(source_stats(name, rows[number], [f for f in findings if f.source == name], limit))
    return Summary(stats, findings, _longest(mixture, rows), rules.deep)


def _longest(mixture: Mixture, rows: list[np.ndarray]) -> Longest | None:
    best = max(range(len(rows)), key=lambda n: int(rows[n]["tokens"].max(initial=-1)))
    if not len(rows[best]) or rows[best]["tokens"].max() < 0:
        return None
    index = int(rows[best]["tokens"].argmax())
    row = rows[best][index]
    return Longest(mixture.names[best], index, mixture[best, index].id, int(row["tokens"]), int(row["media"]))


def _size(mixture: Mixture, source: int) -> int:
    """Samples of a source, those in quarantine included."""
    return min(len(mixture.sources[source]), mixture.entries[source].limit or len(mixture.sources[source]))


def _total(mixture: Mixture) -> int:
    return sum(_size(mixture, source) for source in range(len(mixture.sources)))


def _spans(mixture: Mixture, done: set[tuple[int, int]]) -> Iterator[Span]:
    for source in range(len(mixture.sources)):
        size = _size(mixture, source)
        for start in range(0, size, SIZE):
            if (source, start) not in done:
                yield source, start, min(size, start + SIZE)


def _key(mixture: Mixture, ways: dict[str, Way], rules: Rules) -> str:
    """What must be the same for one check to go on with another's parts."""
    told: list[Any] = [rules.dump(), SIZE]
    for name, entry, source in zip(mixture.names, mixture.entries, mixture.sources, strict=True):
        way = ways.get(name)
        told.append([name, entry.dump(), len(source), getattr(getattr(source, "records", None), "stamp", None)])
        told.append([way.processor.config.hash(), way.max_length] if way else None)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- workers

_examiner: Examiner | None = None


def _run(examiner: Examiner, spans: list[Span], workers: int) -> Iterator[Part]:
    """The parts in the order that they get ready; only ``AHEAD`` for each worker are on their way at a time."""
    if workers == 0 or len(spans) < 2:
        for span in spans:
            yield examiner.part(*span)
        return
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(spans)), context, _begin, (examiner,))
    waiting: dict[Future[Part], Span] = {}
    try:
        rest = iter(spans)
        for span in rest:
            waiting[pool.submit(_work, span)] = span
            if len(waiting) < AHEAD * workers:
                continue
            yield from _ready(examiner, waiting)
        while waiting:
            yield from _ready(examiner, waiting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ready(examiner: Examiner, waiting: dict[Future[Part], Span]) -> Iterator[Part]:
    finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in finished:
        source, start, stop = waiting.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool:
            name = examiner.mixture.names[source]
            raise ChiasmError(
                f"a worker process died (killed for memory, or by a decoder) near the samples {start} to {stop - 1} of "
                f"{name!r}; run again with --workers 1 to go on, or --workers 0 to see where"
            ) from None


def _begin(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed check must not leave its workers behind
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(span: Span) -> Part:
    assert _examiner is not None
    return _examiner.part(*span)
