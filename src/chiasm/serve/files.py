"""Pictures of this machine by ``file://`` addresses, from one folder that the operator opened, and nowhere else."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from chiasm.serve.fetch import Refused
from chiasm.serve.options import MediaOptions


def read(url: str, options: MediaOptions) -> bytes:
    """The bytes of ``file:///root/.../picture.png``. Raises Refused, with one text whatever the reason is.

    Every folder is opened from the one above it without following a link, so that neither ``..`` nor a link that
    appears in between can lead out of the root.
    """
    if options.root is None:
        raise Refused("pictures are not read from paths here; send them as data URLs")
    refused = Refused("this path of a picture is not one that may be read here")
    shape = re.fullmatch(r"(?i)file://(/[^?#]*)", url)
    path = unquote(shape[1], errors="strict") if shape else ""
    root = str(Path(options.root).resolve())
    steps = path[len(root) + 1 :].split("/")
    if not path.startswith(root + "/") or any(step in ("", ".", "..") for step in steps) or "\0" in path:
        raise refused
    if os.open not in os.supports_dir_fd:
        raise Refused("pictures are not read from paths on this system; send them as data URLs")
    try:
        return _read(root, steps, options.picture_bytes)
    except OSError:
        raise refused from None


def _read(root: str, steps: list[str], most: int) -> bytes:
    held = [os.open(root, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for step in steps[:-1]:
            held.append(os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=held[-1]))
        # Without O_NONBLOCK a named pipe would hold this thread for ever.
        held.append(os.open(steps[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=held[-1]))
        status = os.fstat(held[-1])
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > most:
            raise Refused(f"a picture's file is above the limit of {most} bytes")
        with os.fdopen(held.pop(), "rb") as stream:
            return stream.read(most)
    finally:
        for descriptor in held:
            os.close(descriptor)
