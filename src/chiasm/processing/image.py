"""Pictures for encoders: opened, fitted to the encoder's square or cut into tiles, and normalised.

Papers: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343), LLaVA-1.5 (arXiv:2310.03744), LLaVA-NeXT (2024),
LLaVA-OneVision (arXiv:2408.03326). Reference: haotian-liu/LLaVA ``mm_utils.py`` c121f04 and the PIL image processors of
transformers 5.23, whose pixels these are, bit by bit.

Differences by design: a picture of extreme proportions never needs more memory than the pixel cap allows, and a
batch has no tiles of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image as Pillow
from pydantic import AfterValidator, Field
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.processing import pixels
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.open import PILLOW_LIMIT, Alpha, open_picture, picture_size
from chiasm.processing.tiling import Tiling, cut
from chiasm.processing.view import View, views
from chiasm.registry import register
from chiasm.types import Layout, Media, MediaItem

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) <= 0:
        raise ValueError("each value must be above 0")
    return values


Positive3 = Annotated[tuple[float, float, float], AfterValidator(_positive)]
Byte = Annotated[int, Field(ge=0, le=255)]


@register("front_end", "image")
class ImageFrontEnd(FrontEnd):
    """A picture → units ``[U, 3, size, size]``: itself, or a base tile and the tiles that show it in detail."""

    kind = "image"
    config: Config

    class Config(FrontEndConfig):
        """How a picture becomes units.

        ``fit``: ``"crop"`` resizes the shorter side to ``shortest_edge`` and cuts the centre out (CLIP); ``"pad"``
        first makes a square with ``pad_color`` (LLaVA-1.5); ``"squash"`` stretches (SigLIP), to ``shortest_edge`` where
        that is given, and then cuts the centre out (ALIGN; never together with tiles). With ``tiling`` the
        picture gives a base tile, stretched, and then its tiles. ``several`` says what pictures get when the sample has
        more than one: ``"tile"`` the same as alone, ``"pad"`` one unit padded to a square (OneVision), ``"single"`` one
        unit by ``fit``. ``alpha``: see ``chiasm.processing.open``.
        """

        type: str = "image"
        placeholder: str | None = "<image>"
        size: int = Field(default=224, ge=1)
        fit: Literal["crop", "pad", "squash"] = "crop"
        shortest_edge: int | None = None  # None: size
        crop_rounding: Literal["floor", "round"] = "floor"  # of half an odd margin; "round" is torchvision's CenterCrop
        resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
        mean: tuple[float, float, float] = CLIP_MEAN
        std: Positive3 = CLIP_STD
        pad_color: tuple[Byte, Byte, Byte] | Literal["mean"] = "mean"
        tiling: Tiling | None = None
        several: Literal["tile", "pad", "single"] = "tile"
        alpha: Alpha = "drop"
        max_pixels: int = Field(default=PILLOW_LIMIT, ge=1, le=PILLOW_LIMIT)
        draft: bool = False  # let the JPEG decoder shrink large pictures: faster, but other pixels

        @property
        def unit_shape(self) -> tuple[int, ...]:
            """``(3, size, size)``."""
            return 3, self.size, self.size

        def model_post_init(self, context: Any) -> None:
            """Checks that the sizes fit each other. Raises ConfigError."""
            if self.edge < self.size:
                raise ConfigError(
                    f"shortest_edge {self.edge} is below size {self.size}: the crop would leave the picture; "
                    "give at least the size"
                )
            if self.tiling:
                self.tiling.check(self.size)

        @property
        def edge(self) -> int:
            """Shorter side in pixels after the resize and before the crop."""
            return self.size if self.shortest_edge is None else self.shortest_edge

        @property
        def background(self) -> tuple[int, int, int]:
            """The colour around a padded picture, 0 to 255."""
            if self.pad_color != "mean":
                return self.pad_color
            red, green, blue = (int(value * 255) for value in self.mean)
            return red, green, blue

    def __init__(self, config: Config):
        super().__init__(config)
        self._resample = Pillow.Resampling[config.resample.upper()]
        self._mean = torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1)
        self._table = pixels.table(self._mean, self._std)

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A picture → ``inputs [U, 3, size, size]``. Raises DataError."""
        image = self.open(medium.data, place)
        layout = self._layout((image.height, image.width), place)
        inputs = self._at_once(image, place)
        return MediaItem(self.kind, self.normalise(self.units(image, place)) if inputs is None else inputs, layout)

    def layout(self, medium: Media, place: Place) -> Layout:
        """The layout that ``self(medium, place)`` gives, from the header of the picture alone. Raises DataError."""
        if self.config.draft:
            image = self.open(medium.data, place)  # the decoder chooses the size
            return self._layout((image.height, image.width), place)
        return self._layout(picture_size(medium.data, place, self.config.max_pixels), place)

    def views(self, original: tuple[int, int], place: Place) -> list[View]:
        """Where a point of a picture of (height, width) ``original`` lies in each of its units."""
        return views(self.config, original, self._tiled(place), place.of > 1 and self.config.several == "pad")

    def size(self, medium: Media, place: Place) -> tuple[int, int]:
        """(height, width) of the picture as its header gives it, upright. Raises DataError."""
        return picture_size(medium.data, place, self.config.max_pixels)

    def open(self, data: Any, place: Place) -> Pillow.Image:
        """``data`` as an upright RGB picture (``chiasm.processing.open``). Raises DataError."""
        config = self.config
        draft = None
        if config.draft:
            largest = [side for pair in config.tiling.pinpoints for side in pair] if config.tiling else []
            draft = max([config.edge, *largest])
        return open_picture(data, place, config.max_pixels, config.alpha, draft)

    def units(self, image: Pillow.Image, place: Place) -> list[Pillow.Image]:
        """The units of an RGB picture, each ``size`` x ``size``, before they are normalised."""
        config = self.config
        if not self._tiled(place):
            fit = "pad" if place.of > 1 and config.several == "pad" else config.fit
            if fit == "squash" and config.edge != config.size:
                return [self._crop(image.resize((config.edge, config.edge), self._resample))]
            return [self._fit(image, fit)]
        assert config.tiling is not None
        base = image.resize((config.edge, config.edge), self._resample)
        tiles = [base, *cut(image, config.tiling, config.size, self._resample)]
        return [self._fit(tile, "squash" if config.fit == "squash" else "crop") for tile in tiles]

    def normalise(self, units: Sequence[Pillow.Image]) -> Tensor:
        """RGB pictures of one size → ``[U, 3, height, width]`` float32: ``(value / 255 - mean) / std``."""
        bytes_ = torch.from_numpy(np.stack([np.asarray(unit) for unit in units])).permute(0, 3, 1, 2)
        result = torch.empty(bytes_.shape, dtype=torch.float32).copy_(bytes_)  # [U, 3, height, width], contiguous
        return result.div_(255).sub_(self._mean).div_(self._std)

    def _at_once(self, image: Pillow.Image, place: Place) -> Tensor | None:
        """The only unit ``[1, 3, size, size]`` by one compiled call, with the same pixels; None where there is none."""
        edge, size = self.config.edge, self.config.size
        if self._tiled(place) or self.config.fit == "pad" or (place.of > 1 and self.config.several == "pad"):
            return None
        wide, high = (edge, edge) if self.config.fit == "squash" else self._scaled(*image.size)
        if wide * high > self.config.max_pixels:
            return None
        part = (self._margin(high - size), self._margin(wide - size), size, size)
        made = pixels.picture(image, (high, wide), part, self.config.resample, self._table)
        return None if made is None else made.unsqueeze(0)

    def _tiled(self, place: Place) -> bool:
        return self.config.tiling is not None and (place.of <= 1 or self.config.several == "tile")

    def _layout(self, original: tuple[int, int], place: Place) -> Layout:
        config = self.config
        shape = (3, config.size, config.size)
        if not self._tiled(place):
            return Layout(1, shape, (0, 0), original)
        assert config.tiling is not None
        rows, columns = config.tiling.grid(original, config.size)
        return Layout(1 + rows * columns, shape, (rows, columns), original)

    def _fit(self, image: Pillow.Image, fit: str) -> Pillow.Image:
        """An RGB picture of any size → ``size`` x ``size``."""
        size = self.config.size
        if fit == "squash":
            return image if image.size == (size, size) else image.resize((size, size), self._resample)
        return self._crop(self._square(image) if fit == "pad" else image)

    def _crop(self, image: Pillow.Image) -> Pillow.Image:
        """Shorter side to ``edge``, then the centre of ``size`` x ``size``."""
        size, (width, height) = self.config.size, image.size
        wide, high = self._scaled(width, height)
        left, top = self._margin(wide - size), self._margin(high - size)
        if wide * high > self.config.max_pixels:
            # A strip such as 1x20000 would grow to gigabytes: only the part that stays is computed.
            x, y = width / wide, height / high
            box = (left * x, top * y, (left + size) * x, (top + size) * y)
            return image.resize((size, size), self._resample, box=box)
        if image.size != (wide, high):
            image = image.resize((wide, high), self._resample)
        return image if (wide, high) == (size, size) else image.crop((left, top, left + size, top + size))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the shorter side at ``edge``."""
        edge = self.config.edge
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)

    def _margin(self, spare: int) -> int:
        return spare // 2 if self.config.crop_rounding == "floor" else round(spare / 2)

    def _square(self, image: Pillow.Image) -> Pillow.Image:
        """The picture in the middle of a square of its longer side; an odd rest goes right or below."""
        side = max(image.size)
        if image.width == image.height:
            return image
        if side * side > self.config.max_pixels:
            # The square of a long strip would be above the cap: the strip is shrunk to the final scale first.
            scale, side = self.config.edge / side, self.config.edge
            width, height = (max(1, round(length * scale)) for length in image.size)
            image = image.resize((width, height), self._resample)
        canvas = Pillow.new("RGB", (side, side), self.config.background)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas
