"""How busy the machine is with a run: processor time of the process and its data workers, memory, the GPU.

Only what the operating system and torch tell without further packages; the GPU's share of busy time needs ``pynvml``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

GIB = 2**30
MOST_WAIT = 0.05  # share of a run's time that may pass in waiting for data before the run says what to do
Item = TypeVar("Item")


class Waits:
    """How long a loop waits for its next batch, against the time that its steps take.

    Without data workers a batch is made in the training process, and all of that is waiting. The first batch, which
    comes with the start of the workers, stands beside the rest. ``paused`` are seconds of the loop that are no step's.
    """

    def __init__(self) -> None:
        self.first = self.waited = self.passed = self.paused = 0.0
        self.read_at = 0.0

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each waited for by the clock."""
        source, asked = iter(items), time.perf_counter()
        begun = None
        for item in source:
            now = time.perf_counter()
            if begun is None:
                self.first, begun = now - asked, now
            else:
                self.waited += now - asked
            yield item
            asked = time.perf_counter()
            self.passed = asked - begun

    def since(self) -> float:
        """Seconds of waiting since the call before, the first batch included."""
        total = self.first + self.waited
        found, self.read_at = total - self.read_at, total
        return found

    @property
    def share(self) -> float:
        """Waiting, as a share of the time of all steps, without the wait for the first batch."""
        return self.waited / max(1e-9, self.passed - self.paused)

    def told(self, workers: int) -> str:
        """The share in a line; above ``MOST_WAIT`` with what would lower it."""
        made = f"{workers} data worker{'s' if workers > 1 else ''}" if workers else "batches made in this process"
        line = f"waited for data {100 * self.share:.1f} % of the time ({made}; first batch after {self.first:.2f} s)"
        if self.share <= MOST_WAIT:
            return line
        more = f"workers: {max(2, 2 * workers)}"
        return f"{line}; give the stage {more}, or a feature_cache where its encoders are frozen"


class Usage:
    """``read`` gives the means since the reading before."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.clock, self.used = time.perf_counter(), _processor_seconds()
        self.asks = self.device.type == "cuda" and _can_ask()

    def read(self) -> dict[str, float]:
        """``usage/cpu_percent`` (100 is one core, workers included), ``usage/memory_gib`` (workers included), and on
        CUDA ``usage/gpu_percent`` and ``usage/gpu_memory_gib``, the most that torch held at once.
        """
        clock, used = time.perf_counter(), _processor_seconds()
        share = 100 * max(0.0, used - self.used) / max(1e-9, clock - self.clock)
        self.clock, self.used = clock, used
        found = {"usage/cpu_percent": round(share, 1), "usage/memory_gib": round(_memory() / GIB, 3)}
        if self.device.type == "cuda":
            found["usage/gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 3)
            if self.asks:
                found["usage/gpu_percent"] = float(torch.cuda.utilization(self.device))
        return found


def told(record: dict[str, float]) -> str:
    """A record's usage in a few words; empty where it has none."""
    words = []
    if "usage/cpu_percent" in record:
        words.append(f"cpu {record['usage/cpu_percent']:.0f} % {record['usage/memory_gib']:.1f} GiB")
    if "usage/gpu_memory_gib" in record:
        busy = f" {record['usage/gpu_percent']:.0f} %" if "usage/gpu_percent" in record else ""
        words.append(f"gpu{busy} {record['usage/gpu_memory_gib']:.1f} GiB")
    return "  ".join(words)


def _workers() -> list[int]:
    return [p.pid for p in multiprocessing.active_children() if p.pid is not None]


def _processor_seconds() -> float:
    """Of this process, its ended children, and its running workers where the system tells."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for pid in _workers():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            continue
    return total


def _memory() -> float:
    """Resident bytes of this process and its workers."""
    found = 0
    for pid in ("self", *_workers()):
        try:
            found += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            continue
    if found:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _can_ask() -> bool:
    try:
        torch.cuda.utilization()
    except Exception:  # no pynvml, or a driver that does not tell
        return False
    return True
