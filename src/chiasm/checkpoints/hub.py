"""A model's name as a folder of this machine: the folder itself, or a snapshot of the hub.

The network is asked only for a name of the form ``owner/name`` that is no folder here, and then only for tensors,
tables and tokenizer files. Remote code is never fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from chiasm.convert.io import refuse_program
from chiasm.errors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt"]
PICKLES = ["*.bin", "*.pt"]
NOT = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in layouts that are not read


def local_folder(name: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder called ``name``, or of the hub's model of that name. Raises CheckpointError."""
    path = checked(name)
    if path.is_dir() and revision is not None:
        raise CheckpointError(f"{path} is a folder of this machine, which has no revision {revision!r}; leave it out")
    return path if path.is_dir() else _snapshot(str(name), revision, allow_pickle)


def checked(name: str | Path) -> Path:
    """``name`` where it may be a model's: a folder, or of the form of a hub name. Raises CheckpointError."""
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(f"a model is loaded by a folder or a hub name, got {type(name).__name__}")
    if not str(name):
        raise CheckpointError("a model is loaded by a folder or a hub name, got an empty text")
    path = Path(name)
    if path.is_dir():
        inner = path / "model"  # what a run's folder holds
        if (inner / "config.json").is_file() and not list(path.glob("*config.json")):
            raise CheckpointError(f"{path} holds no model, but {inner} does: give that")
        return path
    if path.exists():
        refuse_program(path)
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}, and it is no hub name (owner/name) either")
    return path


def _snapshot(name: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = FILES + (PICKLES if allow_pickle else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=NOT))
    except Exception as error:  # the client raises many kinds: no network, no such model, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {name!r} here, and the hub's model of that name could not be fetched: {reason}"
        ) from None
