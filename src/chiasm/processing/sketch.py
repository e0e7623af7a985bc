"""Samples without their pixels: the same ids, targets and slots, from the headers of the media alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from chiasm.processing.base import FrontEnd, Place
from chiasm.processing.processor import Processor
from chiasm.types import Media, MediaItem


class HeaderOnly(FrontEnd):
    """A front end whose items have a layout and no pixels: ``inputs [U, *shape]`` on the device ``meta``."""

    def __init__(self, front_end: Any):
        super().__init__(front_end.config)
        self.front_end, self.kind = front_end, front_end.kind
        for name in ("views", "size"):
            if hasattr(front_end, name):
                setattr(self, name, getattr(front_end, name))

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A medium → its layout. A front end that cannot tell it without decoding is run. Raises DataError."""
        layout = getattr(self.front_end, "layout", None)
        if layout is None:
            return self.front_end(medium, place)
        found = layout(medium, place)
        return MediaItem(self.kind, torch.empty((found.units, *found.shape), device="meta"), found)


def sketching(processor: Processor) -> Processor:
    """A processor that gives the samples of ``processor`` without opening their media beyond the headers."""
    other = copy.copy(processor)
    other.front_ends = {kind: HeaderOnly(front_end) for kind, front_end in processor.front_ends.items()}
    return other
