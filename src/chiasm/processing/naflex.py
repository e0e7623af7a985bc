"""Pictures as lists of patches, at their own proportions: SigLIP 2's NaFlex.

Paper: SigLIP 2 (arXiv:2502.14786, section 2.4). Reference: ``Siglip2ImageProcessorPil`` of transformers 5.23, whose
pixels these are. A picture is resized so that both sides are multiples of a patch and it has as many patches as
``patches`` allows; the proportions change by less than a patch.

Differences by design: a list is as long as its picture's patches; a batch fills up to its longest one, not to
``patches``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as Pillow
from pydantic import Field

from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.image import Positive3
from chiasm.processing.open import PILLOW_LIMIT, Alpha, open_picture, picture_size
from chiasm.registry import register
from chiasm.types import Layout, Media, MediaItem

HALF = (0.5, 0.5, 0.5)
CLOSE = 1e-5  # how near to the largest scale the search comes, as in the reference


@register("front_end", "naflex")
class NaFlexFrontEnd(FrontEnd):
    """A picture → one unit ``[1, N, patch·patch·3]``: its patches row by row, the colours of a pixel side by side."""

    kind = "image"
    config: Config

    class Config(FrontEndConfig):
        """``patch``: side of a patch in pixels. ``patches``: how many a picture has at most."""

        type: str = "naflex"
        patch: int = Field(default=16, ge=1)
        patches: int = Field(default=256, ge=1)
        resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
        mean: tuple[float, float, float] = HALF
        std: Positive3 = HALF
        alpha: Alpha = "drop"
        max_pixels: int = Field(default=PILLOW_LIMIT, ge=1, le=PILLOW_LIMIT)

        @property
        def sample_shape(self) -> tuple[int, ...]:
            """That of a picture with all the patches there may be."""
            return (self.patches, self.patch**2 * 3)

        def grid(self, height: int, width: int) -> tuple[int, int]:
            """Rows and columns of the patches of a picture, by halving the range of scales as the reference does."""
            low, high = CLOSE / 10, 100.0
            while high - low >= CLOSE:
                middle = (low + high) / 2
                if math.prod(self._grid(middle, height, width)) <= self.patches:
                    low = middle
                else:
                    high = middle
            return self._grid(low, height, width)

        def _grid(self, scale: float, height: int, width: int) -> tuple[int, int]:
            rows, columns = (max(1, math.ceil(side * scale / self.patch)) for side in (height, width))
            return rows, columns

    def __init__(self, config: Config):
        super().__init__(config)
        self._resample = Pillow.Resampling[config.resample.upper()]
        self._mean = torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A picture → ``inputs [1, N, patch·patch·3]``, of ``layout.grid`` rows and columns. Raises DataError."""
        image = open_picture(medium.data, place, self.config.max_pixels, self.config.alpha, None)
        layout = self._layout((image.height, image.width))
        (rows, columns), side = layout.grid, self.config.patch
        if image.size != (columns * side, rows * side):
            image = image.resize((columns * side, rows * side), self._resample)
        values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()  # [3, height, width]
        values = values.div_(255).sub_(self._mean).div_(self._std)
        patches = values.unflatten(2, (columns, side)).unflatten(1, (rows, side))  # [3, rows, side, columns, side]
        inputs = patches.permute(1, 3, 2, 4, 0).reshape(1, *layout.shape)  # [1, N, side*side*3]
        return MediaItem(self.kind, inputs.contiguous(), layout, ragged=True)

    def layout(self, medium: Media, place: Place) -> Layout:
        """The layout that ``self(medium, place)`` gives, from the header of the picture alone. Raises DataError."""
        return self._layout(picture_size(medium.data, place, self.config.max_pixels))

    def _layout(self, original: tuple[int, int]) -> Layout:
        rows, columns = self.config.grid(*original)
        shape: Any = (rows * columns, self.config.patch**2 * 3)
        return Layout(1, shape, (rows, columns), original)
