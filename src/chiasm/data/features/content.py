"""What a medium is, whatever it is called: the hash of its content and of the way it is made into tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image as Pillow
from torch import nn

from chiasm.processing.base import FrontEnd, Place
from chiasm.types import Media


class Contents:
    """Hashes of media. Files are read once for each path, size and time of change."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int, int], bytes] = {}

    def of(self, medium: Media) -> str:
        """32 hexadecimal digits, or nothing where the medium holds what cannot be hashed."""
        mark = hashlib.blake2b(medium.kind.encode(), digest_size=16)
        for field in dataclasses.fields(medium):
            if not self._add(mark, getattr(medium, field.name)):
                return ""
        return mark.hexdigest()

    def _add(self, mark: Any, data: Any) -> bool:
        """Whether ``data`` could be added to the hash ``mark``."""
        if data is None or isinstance(data, (int, float)):
            mark.update(repr(data).encode())
        elif isinstance(data, (bytes, bytearray, memoryview)):
            mark.update(data)
        elif isinstance(data, str) and data[:5].lower() == "data:":
            mark.update(data.encode())
        elif isinstance(data, (str, Path)):
            return self._file(mark, Path(data))
        elif isinstance(data, Pillow.Image):
            # What the decoder left beside the pixels counts too: palette, transparency, orientation.
            beside = sorted((str(k), repr(v)) for k, v in (*data.info.items(), *data.getexif().items()))
            mark.update(f"{data.mode}{data.size}{data.getpalette()}{beside}".encode())
            mark.update(data.tobytes())
        elif hasattr(data, "__array__"):
            array = np.ascontiguousarray(data)
            if array.dtype == object:
                return False
            mark.update(f"{array.dtype.str}{array.shape}".encode())
            mark.update(array.data if array.size else b"")
        elif isinstance(data, Sequence):
            mark.update(f"[{len(data)}]".encode())
            return all(self._add(mark, part) for part in data)
        else:
            return False
        return True

    def _file(self, mark: Any, path: Path) -> bool:
        try:
            state = path.stat()
            known = (str(path), state.st_size, state.st_mtime_ns)
            if known not in self._files:
                self._files[known] = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
        except OSError:
            return False  # opening it will say what is wrong
        mark.update(self._files[known])
        return True


def processing_hash(front_end: FrontEnd, place: Place) -> str:
    """How a front end makes tensors: its configuration, the decoder's version, whether the medium stands alone."""
    told = f"{front_end.config.hash()} {PIL.__version__} {place.of > 1}"
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """All of a module's weights and buffers: names, types and every byte."""
    mark = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        mark.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        mark.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return mark.hexdigest()
