"""Runs a function in several processes, within a limit of time. They are forked: nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT = 300.0
"""Seconds until a rank counts as hanging: generous, since four ranks may share one busy core."""


def launch(count: int, work: Callable[..., Any], folder: Path, *given: Any, limit: float = LIMIT) -> list[Any]:
    """What ``work(folder, *given)`` returned in each of ``count`` processes. Fails where one fails or is not done."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(r, count, port, work, folder, given)) for r in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [r for r, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    errors = [(folder / f"error{r}.txt") for r in range(count)]
    told = "\n".join(f"rank {r}:\n{e.read_text()}" for r, e in enumerate(errors) if e.is_file())
    assert not late, f"ranks {late} of {count} were not done after {limit} s\n{told}"
    assert not told, told
    return [torch.load(folder / f"result{r}.pt", weights_only=False) for r in range(count)]


def _run(rank: int, count: int, port: int, work: Callable[..., Any], folder: Path, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        result = work(folder, *given)
        torch.save(result, folder / f"result{rank}.pt")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)
