"""Small labelled pictures in one file: arrays of NumPy (``.npz``), or the idx files of MNIST and its like.

Layouts: ``images [n, height, width]`` of uint8 and ``labels [n]`` in an ``.npz``, with ``class_names`` or not; or an
idx3 file beside an idx1 file (LeCun's layout: magic number, sizes as big-endian words, bytes), gzipped or not.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from chiasm.data.base import Example, Source, SourceConfig
from chiasm.errors import DataError
from chiasm.registry import register
from chiasm.types import Image, Message, Text


class LabelledConfig(SourceConfig):
    """``file`` holds pictures (and, if an ``.npz``, labels); ``labels`` is the idx file of an idx file's labels.

    A picture's text is its class's name in one of ``templates``, in turn. One picture in ``every`` is the test split,
    the others the training split.
    """

    type: str = "labelled"
    file: str
    labels: str | None = None
    names: tuple[str, ...] = ()  # of the classes, by number; those of the file where there are any
    templates: tuple[str, ...] = ("{}",)
    split: Literal["train", "test", "all"] = "all"
    every: int = Field(default=5, gt=1)

    @field_validator("templates")
    @classmethod
    def _place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        bad = [t for t in templates if "{}" not in t]
        if bad or not templates:
            raise ValueError(f"each template needs a place {{}} for the name, got {bad[:1] or 'none'}")
        return templates


@register("source", "labelled")
class Labelled(Source):
    """One picture and a text with its class's name; the name is the accepted answer."""

    Config = LabelledConfig
    quick = True

    def __init__(self, config: LabelledConfig):
        super().__init__(config)
        self.images, labels, names = _read(config)
        self.names = config.names or names
        if len(self.images) != len(labels):
            raise DataError(f"{config.file}: holds {len(self.images)} pictures and {len(labels)} labels")
        if int(labels.max(initial=0)) >= len(self.names):
            raise DataError(
                f"{config.file}: has label {labels.max()}, but {len(self.names)} names; give all in 'names'"
            )
        self.labels = labels
        inside = np.arange(len(labels)) % config.every == 0
        chosen = {"all": np.ones_like(inside), "test": inside, "train": ~inside}[config.split]
        self.rows = np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """The example; its id is the picture's number in the file."""
        row = int(self.rows[index])
        name = self.names[int(self.labels[row])]
        text = self.config.templates[index % len(self.config.templates)].replace("{}", name)
        messages = (Message("user", (Image(self.images[row]),)), Message("assistant", (Text(text),)))
        return Example(f"{Path(self.config.file).stem}/{row}", messages, task="labels", answers=(name,))


def _read(config: LabelledConfig) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures ``[n, height, width]`` (or with 3 channels), labels ``[n]``, names. Raises DataError."""
    path = Path(config.file)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as held:
                names = tuple(str(n) for n in held["class_names"]) if "class_names" in held else ()
                return held["images"], held["labels"].astype(np.int64), names
        if config.labels is None:
            raise DataError(f"{path}: an idx file holds no labels; name their file in 'labels'")
        return _idx(path), _idx(Path(config.labels)).astype(np.int64), ()
    except (OSError, KeyError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as labelled pictures: {error}") from None


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's layout."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, axes = struct.unpack(">HBB", data[:4])
    if zero or kind != 8:
        raise ValueError(f"{path.name} does not begin as an idx file of bytes")
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
