"""Pictures changed at random in training: a part of them, their mirror image, and operations drawn from a list.

Papers: RandAugment (arXiv:1909.13719); ALBEF (arXiv:2107.07651), ViLT (arXiv:2102.03334) and BEiT-3 (arXiv:2208.10442)
train with it. References: ``RandomAugment`` of salesforce/ALBEF b9727e4 (VLMo and BEiT-3 have the same), the list of
dandelin/ViLT 762fd39; the operations are those of torchvision's ``RandAugment`` on Pillow's pictures.

Differences by design: Pillow does what the references do with OpenCV, so turned and sheared pictures differ by
rounding; where a picture is moved, pixels are bilinear and what comes in from outside has one colour.

Choices are drawn from torch's default generator, which the loader sets by the sample's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps
from pydantic import AfterValidator, Field

from chiasm.config import Config
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.processing.base import FrontEnd, Place
from chiasm.processing.view import View
from chiasm.types import Layout, Media, MediaItem

Byte = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, le=1)]
Picture = Pillow.Image
MOVED = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})
"""Operations after which a thing is in another place of the picture."""
REFUSED = (
    "and this stage's augment moves what they show (crop, flip, rotate, shear, translate): leave augment out for a "
    "stage with this source, or keep only operations on colours in it"
)


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}; {nearest(name, OPERATIONS)}")
    if not names:
        raise ValueError("give at least one operation, or leave them out")
    return names


class Augment(Config):
    """``crop``: the least and the most share of a picture's area that is seen, at a ratio of sides within ``ratio``,
    resized to the model's square. ``flip``: chance that left and right change places; texts that speak of sides are
    then wrong. ``number`` operations are drawn from ``operations``, each done with ``chance``, as strongly as ``level``
    (0 to 1) says. ``shift`` is the way in pixels at level 1.
    """

    crop: tuple[Share, Share] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.0
    number: int = Field(default=0, ge=0)
    level: Share = 0.7
    chance: Share = 0.5
    shift: float = Field(default=10.0, ge=0)
    fill: tuple[Byte, Byte, Byte] = (128, 128, 128)
    operations: Annotated[tuple[str, ...], AfterValidator(_known)] = (
        *("identity", "auto_contrast", "equalize", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    )

    def model_post_init(self, context: Any) -> None:
        """Raises ConfigError for bounds in the wrong order."""
        for name, bounds in (("crop", self.crop), ("ratio", self.ratio)):
            if bounds is not None and not 0 < bounds[0] <= bounds[1]:
                raise ConfigError(f"augment.{name} is {list(bounds)}; give the lower bound, above 0, first")

    @property
    def moves(self) -> bool:
        """Whether something may be elsewhere in the picture afterwards, or outside of it."""
        return bool(self.crop or self.flip or (self.number and MOVED.intersection(self.operations)))

    def __call__(self, image: Picture, size: int | None = None) -> Picture:
        """An RGB picture → a changed one; with ``crop`` of ``size`` x ``size``."""
        if self.crop is not None:
            assert size is not None
            image = image.crop(self.part(image.width, image.height)).resize((size, size), Pillow.Resampling.BICUBIC)
        if self.flip and _draw() < self.flip:
            image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        for place in torch.randint(len(self.operations), (self.number,)).tolist():
            if _draw() < self.chance:
                image = self.done(self.operations[place], image)
        return image

    def done(self, name: str, image: Picture) -> Picture:
        """One operation, to a random side where it has sides."""
        sign = -1.0 if name in MOVED and _draw() < 0.5 else 1.0
        return OPERATIONS[name](image, sign * self.level, self)

    def part(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A random box (left, top, right, bottom), as torchvision's ``RandomResizedCrop`` draws it."""
        assert self.crop is not None
        low, high = (math.log(bound) for bound in self.ratio)
        for _ in range(10):
            area = width * height * (self.crop[0] + (self.crop[1] - self.crop[0]) * _draw())
            ratio = math.exp(low + (high - low) * _draw())
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left, top = (int(torch.randint(spare + 1, ())) for spare in (width - wide, height - tall))
                return left, top, left + wide, top + tall
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])  # none fitted: the largest in the middle
        wide, tall = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - wide) // 2, (height - tall) // 2
        return left, top, left + wide, top + tall


def _draw() -> float:
    return float(torch.rand(()))


# ---------------------------------------------------------------------------------------------------------- operations


def _affine(image: Picture, values: tuple[float, float, float, float, float, float], given: Augment) -> Picture:
    """Pixel (x, y) is that at (a x + b y + c, d x + e y + f)."""
    method, kind = Pillow.Transform.AFFINE, Pillow.Resampling.BILINEAR
    return image.transform(image.size, method, values, kind, fillcolor=given.fill)


def _factor(enhance: Any) -> Callable[[Picture, float, Augment], Picture]:
    return lambda image, level, given: enhance(image).enhance(0.1 + 1.8 * level)


def _solarize_add(image: Picture, level: float, given: Augment) -> Picture:
    """Darker pixels grow lighter by up to 110."""
    values = np.asarray(image).astype(np.int16)
    lighter = np.clip(values + int(110 * level), 0, 255)
    return Pillow.fromarray(np.where(values < 128, lighter, values).astype(np.uint8))


OPERATIONS: dict[str, Callable[[Picture, float, Augment], Picture]] = {
    "identity": lambda image, level, given: image,
    "auto_contrast": lambda image, level, given: ImageOps.autocontrast(image),
    "equalize": lambda image, level, given: ImageOps.equalize(image),
    "invert": lambda image, level, given: ImageOps.invert(image),
    "posterize": lambda image, level, given: ImageOps.posterize(image, max(1, int(4 * level))),
    "solarize": lambda image, level, given: ImageOps.solarize(image, 256 * level),  # type: ignore[arg-type]
    "solarize_add": _solarize_add,
    "color": _factor(ImageEnhance.Color),
    "contrast": _factor(ImageEnhance.Contrast),
    "brightness": _factor(ImageEnhance.Brightness),
    "sharpness": _factor(ImageEnhance.Sharpness),
    "rotate": lambda image, level, given: image.rotate(30 * level, Pillow.Resampling.BILINEAR, fillcolor=given.fill),
    "shear_x": lambda image, level, given: _affine(image, (1, 0.3 * level, 0, 0, 1, 0), given),
    "shear_y": lambda image, level, given: _affine(image, (1, 0, 0, 0.3 * level, 1, 0), given),
    "translate_x": lambda image, level, given: _affine(image, (1, 0, given.shift * level, 0, 1, 0), given),
    "translate_y": lambda image, level, given: _affine(image, (1, 0, 0, 0, 1, given.shift * level), given),
}


# ----------------------------------------------------------------------------------------------------------- front end


class AugmentedFrontEnd(FrontEnd):
    """A front end of pictures that changes each before it is fitted. Boxes in a picture whose things move are refused.

    Raises ConfigError for a front end that does not say how large its square is, where a part is cut out.
    """

    def __init__(self, inner: FrontEnd, augment: Augment):
        super().__init__(inner.config)
        self.inner, self.kind, self.augment = inner, inner.kind, augment
        config: Any = inner.config
        self._side: int | None = None
        if augment.crop is not None:
            shape, edge = config.unit_shape, getattr(config, "edge", None)
            if shape is None or getattr(config, "tiling", None) or edge != shape[-1]:
                raise ConfigError(
                    f"augment.crop gives pictures of the model's square, and front end {config.type!r} cuts tiles, "
                    "crops by itself, or has pictures of several sizes; leave augment.crop out"
                )
            self._side = int(shape[-1])

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """The picture, changed, as the front end makes it. Raises DataError."""
        inner: Any = self.inner
        changed = self.augment(inner.open(medium.data, place), self._side)
        return inner(replace(medium, data=changed), place)  # type: ignore[no-any-return]

    @property
    def views(self) -> Callable[[tuple[int, int], Place], list[View]] | None:
        """Where a point of the picture lies: only where nothing moved."""
        return self._refused if self.augment.moves else getattr(self.inner, "views", None)

    def _refused(self, original: tuple[int, int], place: Place) -> list[View]:
        raise DataError(f"{place}: has boxes, {REFUSED}", "box")

    def layout(self, medium: Media, place: Place) -> Layout:
        """That of the picture as it is: its size in tokens does not change where all have one size."""
        return self.inner.layout(medium, place)  # type: ignore[no-any-return,attr-defined]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the front end can do."""
        if name == "inner":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


__all__ = ["MOVED", "OPERATIONS", "Augment", "AugmentedFrontEnd"]
