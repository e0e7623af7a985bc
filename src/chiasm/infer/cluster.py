"""Ray (extra ``ray``) as batches of answers and of vectors use it: joined in silence, with errors in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chiasm.errors import ChiasmError, ConfigError


def joined() -> Any:
    """The package, with a cluster: the one that RAY_ADDRESS names, else one on this machine.

    Raises ConfigError where ray is not installed, or the cluster is not there.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'chiasm[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"the Ray cluster cannot be joined: {_last(error)}; see RAY_ADDRESS") from None
    ray.data.DataContext.get_current().enable_progress_bars = False  # the commands have their own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong in an actor, as an error of ours: its last line, not the traces of three processes."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise ChiasmError(f"an actor of the Ray cluster failed: {_last(error)}") from error


def everywhere(path: str) -> str:
    """A path as other processes find it; a name that is no path here stays as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _last(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


__all__ = ["everywhere", "joined", "told"]
