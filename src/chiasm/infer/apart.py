"""Threads that each compute on a core of their own.

Two ways to use several cores: every matrix product is shared among all of them, or each core does whole pieces of
work by itself. For many independent pieces (pictures to be decoded and embedded) the second wastes nothing: no core
waits for another at the end of a product, decoding and products mix freely, and what a core works on stays in its own
cache.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn


@functools.cache
def _setter() -> Callable[[int], Any] | None:
    """OpenMP's own call, which counts for the thread that makes it; torch's sets the number for all threads."""
    try:
        return ctypes.CDLL(None).omp_set_num_threads  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return None


def _alone() -> None:
    torch.get_num_threads()  # torch gives a new thread its number when it is first asked
    setter = _setter()
    if setter is not None:
        setter(1)


@functools.cache
def possible() -> bool:
    """Whether a thread can be made to compute by itself here, and the others stay as they are."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=_alone) as pool:
        own = pool.submit(torch.get_num_threads).result()
    return _setter() is not None and own == 1 and torch.get_num_threads() == before


def cores(model: nn.Module) -> int:
    """How many threads should each run the model by itself; 1: none should.

    Only on a CPU, and never in training mode: threads would meet each other where it is left and entered again.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or any(m.training for m in model.modules()):
        return 1
    return torch.get_num_threads() if torch.get_num_threads() > 1 and possible() else 1


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each."""
    return ThreadPoolExecutor(threads, initializer=_alone)
