"""Pictures that keep their proportions: the shorter side is given, both are multiples of the patch.

Paper: ViLT (arXiv:2102.03334). Reference: ``MinMaxResize`` of dandelin/ViLT 762fd39, ``ViltImageProcessorPil`` of
transformers 5.23, whose pixels these are, bit by bit.

The pictures of a batch differ in size: zeros fill up to the largest, and what they cover no model looks at.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as Pillow
from pydantic import Field, PositiveFloat, PositiveInt

from chiasm.errors import DataError
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.image import Positive3
from chiasm.processing.open import PILLOW_LIMIT, Alpha, open_picture, picture_size
from chiasm.registry import register
from chiasm.types import Layout, Media, MediaItem


@register("front_end", "proportional")
class ProportionalFrontEnd(FrontEnd):
    """A picture → one unit ``[1, 3, height, width]`` of its own size."""

    kind = "image"
    config: Config

    class Config(FrontEndConfig):
        """``shortest_edge`` in pixels; ``longest_ratio`` times it is the most that the longer side may have.

        Both sides are then cut down to multiples of ``multiple``, so proportions change by less than one patch.
        """

        type: str = "proportional"
        placeholder: str | None = None
        shortest_edge: PositiveInt = 384
        longest_ratio: PositiveFloat = 1333 / 800  # of the sizes that detectors see COCO in
        multiple: PositiveInt = 32
        resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
        std: Positive3 = (0.5, 0.5, 0.5)
        alpha: Alpha = "drop"
        max_pixels: int = Field(default=PILLOW_LIMIT, ge=1, le=PILLOW_LIMIT)

        def size(self, height: int, width: int) -> tuple[int, int]:
            """(height, width) that a picture of this size is given; a side may come out as 0."""
            longest = int(self.longest_ratio * self.shortest_edge)
            scale = self.shortest_edge / min(height, width)
            if height < width:
                high, wide = float(self.shortest_edge), scale * width
            else:
                high, wide = scale * height, float(self.shortest_edge)
            if max(high, wide) > longest:
                scale = longest / max(high, wide)
                high, wide = scale * high, scale * wide
            rows, columns = (int(side + 0.5) // self.multiple for side in (high, wide))
            return rows * self.multiple, columns * self.multiple

    def __init__(self, config: Config):
        super().__init__(config)
        self._resample = Pillow.Resampling[config.resample.upper()]
        self._mean = torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A picture → ``inputs [1, 3, height, width]``. Raises DataError, also for a strip without a whole patch."""
        image = self.open(medium.data, place)
        layout = self._layout((image.height, image.width), place)
        high, wide = layout.shape[1:]
        image = image.resize((wide, high), self._resample)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        values = torch.empty(1, *pixels.shape, dtype=torch.float32).copy_(pixels)  # [1, 3, height, width], contiguous
        return MediaItem(self.kind, values.div_(255).sub_(self._mean).div_(self._std), layout, ragged=True)

    def open(self, data: Any, place: Place) -> Pillow.Image:
        """``data`` as an upright RGB picture (``chiasm.processing.open``). Raises DataError."""
        return open_picture(data, place, self.config.max_pixels, self.config.alpha, None)

    def layout(self, medium: Media, place: Place) -> Layout:
        """The layout that ``self(medium, place)`` gives, from the header of the picture alone. Raises DataError."""
        return self._layout(picture_size(medium.data, place, self.config.max_pixels), place)

    def _layout(self, original: tuple[int, int], place: Place) -> Layout:
        high, wide = self.config.size(*original)
        if not high or not wide:
            raise DataError(
                f"{place}: a picture of {original[0]}x{original[1]} pixels keeps its proportions at {high}x{wide}, "
                f"which holds no patch of {self.config.multiple} pixels; crop it first",
                "size",
            )
        return Layout(1, (3, high, wide), (0, 0), original)
