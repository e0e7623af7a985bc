"""Resident memory that nothing needs goes back to the system: holes in the C library's heap, weights already cast.

Batches of changing lengths leave holes that the heap keeps, and a compiled kernel for every shape of a product that
oneDNN keeps; without this a run on the CPU grows with its first hundreds of steps. The calls are the operating system's
own (``malloc_trim`` of glibc, ``madvise`` of Linux); elsewhere nothing happens. No value changes: a page of a mapped
file that is given back is read again when it is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

GROWTH = 1.05  # over the level after a trim: from there on the heap is trimmed again
KERNELS = 256  # of oneDNN's cache, which holds 1024 by itself; in bfloat16 one takes about 0.7 MB
PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4 and later: give the pages back, keep what they hold


class Heap:
    """Trims the heap after a step where the process has grown. ``trim`` and ``resident`` stand in for the system's."""

    def __init__(self, trim: Callable[[], None] | None = None, resident: Callable[[], int] | None = None):
        self.trim, self.resident = trim or _trim(), resident or _resident
        self.level = 0.0  # what a step needs, as far as is known
        self.trimmed = True

    def stepped(self) -> None:
        """After each step, when nothing of it is needed any more."""
        if self.trim is None or not (now := self.resident()):
            return
        if self.trimmed:  # this step began without holes; one with small batches says little about the next
            self.level, self.trimmed = max(float(now), 0.98 * self.level), False
        elif now > GROWTH * self.level:
            self.trim()
            self.trimmed = True


def few_kernels() -> None:
    """Bound the cache of compiled kernels, where the user's environment says nothing about it.

    oneDNN reads the variable at its first product, so it holds from the first stage of a process on.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def page_out(tensor: Tensor) -> None:
    """Give back the pages of a tensor on the CPU that will not be read for long: those of a mapped file leave memory.

    Its values stay: what is touched again is read again from the file; memory that is no file's stays where it is.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), PAGEOUT)


def _trim() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; musl has none
    return (lambda: found(0) and None) if found else None


def _resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0
