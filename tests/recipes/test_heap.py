"""Memory that nothing needs goes back to the system, when a run has grown, and no value changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chiasm.convert.io import open_weights
from chiasm.train import heap
from chiasm.train.heap import Heap, page_out

MIB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not tell what is resident")


def test_the_heap_is_trimmed_where_a_step_ends_with_more_than_a_clean_one():
    resident, seen, trims = iter([100, 104, 106, 101, 103, 107, 90, 102, 106]), [], []

    def now() -> int:
        seen.append(next(resident))
        return seen[-1]

    kept = Heap(trim=lambda: trims.append(len(seen)), resident=now)
    for _ in range(9):
        kept.stepped()
    # 106 > 1.05 · 100; level 101 after it; 107 > 1.05 · 101; a small step (90) lowers the level by 2 % only: 98.98
    assert trims == [3, 6, 9]
    assert kept.level == pytest.approx(0.98 * 101)


def test_nothing_happens_where_the_system_cannot(monkeypatch):
    monkeypatch.setattr(heap, "_trim", lambda: None)
    Heap(resident=lambda: 10**9).stepped()
    trims = []
    silent = Heap(trim=lambda: trims.append(1), resident=lambda: 0)
    for _ in range(5):
        silent.stepped()
    assert not trims


def test_the_cache_of_kernels_is_bounded_unless_the_user_says_otherwise(monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    heap.few_kernels()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    heap.few_kernels()
    assert os.environ[name] == str(heap.KERNELS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux's C library")
def test_holes_in_the_heap_go_back():
    trim = heap._trim()
    if trim is None or not heap._resident():
        pytest.skip("this C library has no malloc_trim")
    parts = [torch.ones(16 * 1024 // 4) for _ in range(16 * 256)]  # 64 MiB, each below the size that is mapped
    parts = parts[255::256]  # what is left keeps the heap from shrinking by itself
    before = heap._resident()
    trim()
    assert before - heap._resident() > 40 * MIB
    assert all(bool((part == 1).all()) for part in parts)


def mapped(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that a tensor begins in that are resident."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ")[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


@linux
def test_weights_of_a_file_leave_memory_and_come_back_as_they_were(tmp_path):
    values = torch.arange(4 * MIB, dtype=torch.float32)
    save_file({"w": values}, tmp_path / "model.safetensors")
    read = open_weights(tmp_path).read("w")
    assert torch.equal(read, values)  # every page is touched
    before = mapped(read)
    page_out(read)
    if before < 16 * MIB or mapped(read) == before:
        pytest.skip("weights are not mapped from their file here, or the system keeps the pages")
    assert mapped(read) < 2 * MIB
    assert torch.equal(read, values)
    changed = values.clone()
    page_out(changed)  # memory of its own
    assert torch.equal(changed, values)
