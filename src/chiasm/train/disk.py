"""The disk of a run: whether it can be written and has room, asked before the first step, and told of where it failed.

A disk that is full in the middle of a run loses nothing: what was being written lay aside, the checkpoints before it
are whole, and the error says which of them ``--resume`` goes on from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from chiasm.errors import CheckpointError, ConfigError
from chiasm.train.checkpoint import checkpoints

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # may also be said of a file that is read
MIB = 2**20


def check(out: Path, stages: Sequence[str]) -> None:
    """Raise ConfigError unless ``out``, or the folder that it would be made in, can be written."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"out: {out} cannot be a folder, for {place} is a file; give another 'out'")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"out: {place} cannot be written by this user; give another 'out'")
    for path in (out / name for name in (*stages, "model")):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"out: {path} is a file where a folder is needed; move it, or give another 'out'")


def room(out: Path, needed: int, what: str) -> None:
    """Raise ConfigError where the disk of ``out`` has less than ``needed`` bytes left."""
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"out: {what} take {_told(needed)} and {_told(free)} are free on the disk of {place}; make room, or give "
            "an 'out' on another disk"
        )


@contextlib.contextmanager
def telling(out: Path, stages: Sequence[str]) -> Iterator[None]:
    """Inside, a failed write becomes a CheckpointError with the room that is left and where the run goes on from."""
    try:
        yield
    except Exception as error:
        why = reason(error, out)
        if why is None:
            raise
        place = getattr(error, "filename", None) or out
        with contextlib.suppress(OSError):
            why += f"; {_told(shutil.disk_usage(out).free)} are free on the disk of {out}"
        raise CheckpointError(f"{place}: could not be written: {why}; make room, then {ahead(out, stages)}") from error


def reason(error: BaseException, out: Path) -> str | None:
    """Why a file of ``out`` could not be written, where that happened. safetensors puts the system's error in words."""
    if isinstance(error, OSError):
        own = Path(error.filename or "").resolve().is_relative_to(out.resolve())
        return os.strerror(error.errno or 0) if error.errno in (REFUSED if own else FULL) else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found and int(found[1]) in FULL else None


def ahead(out: Path, stages: Sequence[str]) -> str:
    """What a run that stopped left, and how to go on."""
    kept = [path for name in stages for path in checkpoints(out / name / "checkpoints")]
    if kept:
        return f"the same command with --resume goes on from {kept[-1]}"
    finished = [name for name in stages if (out / name / "done.json").is_file()]
    if finished:
        return f"the same command with --resume goes on after what is finished: {', '.join(finished)}"
    return "begin again, for there is no checkpoint yet: a stage's save_every says how often one is written"


def _told(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size < 1024 * MIB else f"{size / MIB / 1024:.1f} GiB"
