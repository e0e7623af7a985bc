"""What a check found, in numbers: for each source and for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chiasm.data.check.kinds import KINDS, Finding
from chiasm.data.quarantine import Quarantine, Quarantined


@dataclass(frozen=True)
class Longest:
    """The sample with the most tokens: the one that a run's memory must be enough for."""

    source: str
    index: int
    id: str
    tokens: int
    media: int


@dataclass(frozen=True)
class SourceStats:
    """One source in numbers. Lengths are in tokens, before any cut; 0 where no model was named."""

    name: str
    samples: int
    bad: int  # samples with a fault
    pictures: int
    text_only: int
    turns: float  # messages of a sample, mean
    mean: float
    median: int
    p95: int
    longest: int
    media: float  # tokens of media, mean
    targets: float  # tokens learned from, mean
    max_length: int | None
    histogram: tuple[tuple[int, int, int], ...] = ()  # (from, to, samples)


@dataclass
class Summary:
    """A whole check."""

    sources: list[SourceStats]
    findings: list[Finding]
    longest: Longest | None
    deep: bool
    seconds: float = 0.0
    resumed: int = 0  # samples that an earlier, killed check had looked at
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.counts = Counter(f.kind for f in self.findings)

    @property
    def samples(self) -> int:
        """Samples looked at."""
        return sum(s.samples for s in self.sources)

    @property
    def bad(self) -> int:
        """Samples that would stop training."""
        return sum(s.bad for s in self.sources)

    def faults(self) -> list[Finding]:
        """What would stop training."""
        return [f for f in self.findings if f.fault]

    def quarantine(self, also: Iterable[str] = ()) -> Quarantine:
        """Every sample with a fault, and those with one of the remarks ``also``; the first reason of each."""
        chosen = {kind for kind, about in KINDS.items() if about.fault} | set(also)
        found: dict[tuple[str, int], Quarantined] = {}
        for f in sorted(self.findings, key=lambda f: not f.fault):
            if f.kind in chosen:
                found.setdefault((f.source, f.index), Quarantined(f.source, f.index, f.id, f.kind, f.message))
        return Quarantine(found.values())

    def dump(self) -> dict[str, Any]:
        """Plain tables, as written to JSON."""
        return {
            "samples": self.samples,
            "bad": self.bad,
            "counts": {kind: self.counts[kind] for kind in KINDS if self.counts[kind]},
            "sources": [vars(s) for s in self.sources],
            "longest": vars(self.longest) if self.longest else None,
            "deep": self.deep,
            "seconds": round(self.seconds, 2),
            "resumed": self.resumed,
        }


def source_stats(name: str, rows: np.ndarray, findings: Sequence[Finding], max_length: int | None) -> SourceStats:
    """The numbers of a source from its rows ``[n]`` and the findings of all."""
    known = rows["tokens"][rows["tokens"] >= 0]
    opened = rows[rows["id"] != 0]
    measured = rows[rows["tokens"] >= 0]
    return SourceStats(
        name,
        samples=len(rows),
        bad=len({f.index for f in findings if f.fault and f.source == name}),
        pictures=int(opened["pictures"].sum()),
        text_only=int((opened["pictures"] == 0).sum()),
        turns=_mean(opened["turns"]),
        mean=_mean(known),
        median=_share(known, 0.5),
        p95=_share(known, 0.95),
        longest=int(known.max(initial=0)),
        media=_mean(measured["media"]),
        targets=_mean(measured["targets"]),
        max_length=max_length,
        histogram=_histogram(known),
    )


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 2) if len(values) else 0.0


def _share(values: np.ndarray, share: float) -> int:
    """The smallest value that ``share`` of them do not exceed."""
    if not len(values):
        return 0
    return int(np.sort(values)[max(0, int(np.ceil(share * len(values))) - 1)])


def _histogram(values: np.ndarray, bins: int = 30) -> tuple[tuple[int, int, int], ...]:
    if not len(values):
        return ()
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.linspace(low, high, min(bins, high - low) + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return tuple((int(a), int(b), int(n)) for a, b, n in zip(edges, edges[1:], counts))
