"""A run that kills itself with SIGKILL at its n-th write to disk: what the resume tests start as a process."""

from __future__ import annotations

import io
import os
import signal
from typing import Any


def work(values: dict[str, Any], point: int, folder: str) -> None:
    """Train, and die right before (even ``point``) or after (odd) the file operation number ``point // 2``."""
    from rich.console import Console

    from chiasm.train import checkpoint
    from chiasm.train.recipe import Recipe
    from chiasm.train.run import train

    count = 0

    def watched(call):
        def inner(*args: Any, **options: Any) -> Any:
            nonlocal count
            here = 2 * count
            count += 1
            if point == here:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **options)
            if point == here + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return inner

    checkpoint.save_file = watched(checkpoint.save_file)
    checkpoint.flush = watched(checkpoint.flush)
    os.replace = watched(os.replace)
    checkpoint.shutil.rmtree = watched(checkpoint.shutil.rmtree)
    train(Recipe.parse(values), resume=True, console=Console(file=io.StringIO()))
    with open(os.path.join(folder, "operations"), "w") as file:
        file.write(str(count))
