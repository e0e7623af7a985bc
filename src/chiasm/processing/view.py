"""Where a picture's points lie in what the model sees: the maps behind resize, pad, crop and tiles.

A unit is the square that an encoder is given; the map of a unit takes a point in pixels of the picture to shares of the
unit's sides, and back. The maps are exact for the arithmetic of ``chiasm.processing.image``, rounding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chiasm.processing.tiling import fitted

XYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """``x' = x · scale_x + left`` and the same for y: pixels of the picture to shares of a unit, 0 to 1."""

    scale_x: float
    scale_y: float
    left: float = 0.0
    top: float = 0.0

    def apply(self, xyxy: XYXY) -> XYXY:
        """A box in pixels of the picture as shares of the unit; beyond 0 and 1 is what the unit does not show."""
        x0, y0, x1, y1 = xyxy
        return (
            x0 * self.scale_x + self.left,
            y0 * self.scale_y + self.top,
            x1 * self.scale_x + self.left,
            y1 * self.scale_y + self.top,
        )

    def to_original(self, xyxy: XYXY) -> XYXY:
        """A box in shares of the unit in pixels of the picture."""
        x0, y0, x1, y1 = xyxy
        return (
            (x0 - self.left) / self.scale_x,
            (y0 - self.top) / self.scale_y,
            (x1 - self.left) / self.scale_x,
            (y1 - self.top) / self.scale_y,
        )

    def then(self, scale_x: float, scale_y: float, left: float, top: float) -> View:
        """This map, and after it another."""
        return View(
            self.scale_x * scale_x, self.scale_y * scale_y, self.left * scale_x + left, self.top * scale_y + top
        )


def views(config: Any, original: tuple[int, int], tiled: bool, padded: bool) -> list[View]:
    """The map of each unit of a picture of (height, width) ``original``, in the order of the units.

    ``config`` is the image front end's; ``tiled`` says whether the picture is cut, ``padded`` whether it is put in a
    square whatever ``fit``, as OneVision does where a sample has several pictures.
    """
    height, width = original
    if not tiled:
        fit = "pad" if padded else config.fit
        if fit == "squash":
            stretched = View(config.edge / width, config.edge / height)
            return [_cropped(config, stretched, config.edge, config.edge)]
        return [_cropped(config, *(_square(config, height, width) if fit == "pad" else (View(1, 1), height, width)))]
    size, edge = config.size, config.edge
    inner = _cropped if config.fit != "squash" else _squashed
    found = [inner(config, View(edge / width, edge / height), edge, edge)]
    target = config.tiling.best(original)
    high, wide = fitted(original, target)
    placed = View(wide / width, high / height, (target[1] - wide) // 2, (target[0] - high) // 2)
    for top in range(0, target[0], size):
        for left in range(0, target[1], size):
            found.append(inner(config, placed.then(1, 1, -left, -top), size, size))
    return found


def _squashed(config: Any, view: View, height: int, width: int) -> View:
    return view.then(1 / width, 1 / height, 0, 0)


def _cropped(config: Any, view: View, height: int, width: int) -> View:
    """The shorter side to ``edge``, then the centre."""
    edge, size = config.edge, config.size
    wide, high = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    left, top = _margin(config, wide - size), _margin(config, high - size)
    return view.then(wide / width / size, high / height / size, -left / size, -top / size)


def _square(config: Any, height: int, width: int) -> tuple[View, int, int]:
    """The picture in the middle of a square, first shrunk where the square would be above the cap."""
    side, view = max(height, width), View(1, 1)
    if height != width and side * side > config.max_pixels:
        scale = config.edge / side
        wide, high = max(1, round(width * scale)), max(1, round(height * scale))
        view, side = View(wide / width, high / height), config.edge
        height, width = high, wide
    return view.then(1, 1, (side - width) // 2, (side - height) // 2), side, side


def _margin(config: Any, spare: int) -> int:
    return spare // 2 if config.crop_rounding == "floor" else round(spare / 2)
