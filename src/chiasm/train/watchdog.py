"""Who waits for whom: every rank writes where it is into a store that all can read.

A collective operation that one rank never enters lets all others wait without a word. The watchdog runs in a thread of
its own, so that it speaks while the main thread stands still: after ``patience`` seconds in one place it prints where
each rank is and ends this process, and with it, under ``torchrun``, the job.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Store(Protocol):
    """The few words of ``torch.distributed.Store`` that are used here."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys were written."""


class Watchdog:
    """Tells and ends a run in which a rank waits longer than ``patience`` seconds for the others."""

    def __init__(
        self, store: Store, rank: int, count: int, patience: float, end: Callable[[str], None] | None = None
    ) -> None:
        self.store, self.rank, self.count, self.patience = store, rank, count, patience
        self.end = end or _end
        self.place, self.since, self.waits = "start", time.time(), False
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def at(self, place: str, waits: bool = False) -> None:
        """This rank now works at ``place``, or ``waits`` there for the others."""
        with self.lock:
            self.place, self.since, self.waits = place, time.time(), waits

    @contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """This rank waits for the others at ``place`` while the block runs."""
        before, waited = self.place, self.waits
        self.at(place, waits=True)
        try:
            yield
        finally:
            self.at(before, waited)

    def close(self) -> None:
        """Stop watching."""
        self.stop.set()
        self.thread.join()

    def told(self) -> str:
        """Where every rank is, by what each wrote last."""
        rows = []
        for rank in range(self.count):
            key = f"chiasm/where/{rank}"
            if not self.store.check([key]):
                rows.append(f"rank {rank}: has not started")
                continue
            place, since, waits = json.loads(self.store.get(key))
            verb = "waits for the others at" if waits else "is busy with"
            rows.append(f"rank {rank}: {verb} {place}, for {max(0.0, time.time() - since):.0f} s")
        return "; ".join(rows)

    def _watch(self) -> None:
        beat = max(0.05, min(5.0, self.patience / 8))
        while not self.stop.wait(beat):
            with self.lock:
                place, since, waits = self.place, self.since, self.waits
            try:
                self.store.set(f"chiasm/where/{self.rank}", json.dumps([place, since, waits]))
                if waits and time.time() - since > self.patience:
                    self.end(
                        f"rank {self.rank} has waited for {self.patience:g} s at {place}; {self.told()}. "
                        "The ranks that are busy hold up the others: look at their output, or raise 'patience'"
                    )
                    return
            except RuntimeError:  # the store's process is gone, and so is the job
                return


def _end(told: str) -> None:
    """Say it and end the process: its main thread stands in a call that nothing can interrupt."""
    print(f"Watchdog: {told}", file=sys.stderr, flush=True)
    os._exit(1)
