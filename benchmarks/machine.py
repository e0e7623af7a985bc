"""The physical limits of this machine, measured: every claim stands beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def results() -> Path:
    """Where results go: the folder that ``CHIASM_BENCH_RESULTS`` names, else ``results`` beside this file."""
    folder = Path(os.environ.get("CHIASM_BENCH_RESULTS") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of several runs, in seconds: the one least disturbed by whatever else the machine does."""
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def matrix_rate(dtype: torch.dtype, n: int = 1024) -> float:
    """Arithmetic of a square matrix product, in GFLOP/s."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ b, 10) / 1e9


def read_bandwidth(mebibytes: int = 512) -> float:
    """How fast memory is read, in GB/s."""
    x = torch.ones(mebibytes * 2**20 // 4)
    return x.numel() * 4 / seconds(lambda: x.sum(), 10) / 1e9


def limits() -> dict[str, float]:
    """All of them."""
    return {
        "matrix product float32, GFLOP/s": round(matrix_rate(torch.float32), 1),
        "matrix product bfloat16, GFLOP/s": round(matrix_rate(torch.bfloat16), 1),
        "memory read, GB/s": round(read_bandwidth(), 1),
        "threads": torch.get_num_threads(),
    }
