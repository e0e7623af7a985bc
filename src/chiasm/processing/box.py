"""Regions as text: a box in pixels of a picture, written the way a model was taught to read and answer it.

Boxes stand in messages in pixels of the upright picture. They follow what the front end does with it (``unit="view"``),
and an answer's boxes come back in the same pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chiasm.config import Config
from chiasm.errors import DataError
from chiasm.processing.base import Place
from chiasm.processing.view import XYXY, View
from chiasm.types import Box, MediaItem, Message


@dataclass(frozen=True)
class Region:
    """What a box needs of its picture: its (height, width), and the map to the unit that shows it whole, if any."""

    original: tuple[int, int]
    view: View | None = None


class BoxFormat(Config):
    """How a box is written.

    ``unit="share"``: shares of the picture's width and height, 0 to 1 (LLaVA, Shikra).
    ``"square"``: shares of the side of the square that the picture is padded to (LLaVA-1.5).
    ``"view"``: shares of what the encoder is given, after resize, pad and crop; of a tiled picture, of its base tile.
    ``"bins"``: whole numbers 0 to ``bins`` (PaLI-Gemma, Qwen-VL).
    ``"pixel"``: pixels of the original picture.
    """

    unit: Literal["share", "square", "view", "bins", "pixel"] = "share"
    digits: int = 2  # decimals of a share
    bins: int = 1000
    form: str = "[{x0}, {y0}, {x1}, {y1}]"

    def write(self, box: Box, region: Region | tuple[int, int], where: str) -> str:
        """The text of a box in a picture of ``(height, width)`` pixels. Raises DataError where it lies outside.

        Of a box that a crop cuts, the part that is seen is written; one that is not seen at all is an error.
        """
        region = region if isinstance(region, Region) else Region(region)
        height, width = region.original
        x0, y0, x1, y1 = box.xyxy
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise DataError(
                f"{where}: box {box.xyxy} does not lie in picture {box.image} of {width} x {height} pixels; give x0, "
                "y0, x1, y1 in pixels of the original picture",
                "box",
            )
        values = self._map(region, where).apply(box.xyxy)
        if self.unit == "view":
            values = _seen(values, box, where)
        if self.unit == "pixel":
            written = [str(round(v)) for v in values]
        elif self.unit == "bins":
            written = [str(round(v * self.bins)) for v in values]
        else:
            written = [f"{v:.{self.digits}f}" for v in values]
        return self.form.format(x0=written[0], y0=written[1], x1=written[2], y1=written[3])

    def read(self, text: str, region: Region | tuple[int, int]) -> list[XYXY]:
        """Every box in an answer, as pixels of the original picture. Text that is no box is passed over."""
        region = region if isinstance(region, Region) else Region(region)
        view, found = self._map(region, "answer"), []
        for match in self._pattern().finditer(text):
            x0, y0, x1, y1 = (float(match[name]) / (self.bins if self.unit == "bins" else 1) for name in NAMES)
            found.append(view.to_original((x0, y0, x1, y1)))
        return found

    def found(self, text: str) -> bool:
        """Whether a text holds a box."""
        return self._pattern().search(text) is not None

    def _map(self, region: Region, where: str) -> View:
        """Pixels of the original picture to the format's unit, before bins and decimals."""
        height, width = region.original
        if self.unit == "pixel":
            return View(1, 1)
        if self.unit == "square":
            side = max(width, height)
            return View(1 / side, 1 / side, (side - width) // 2 / side, (side - height) // 2 / side)
        if self.unit == "view":
            if region.view is None:
                raise DataError(
                    f"{where}: boxes are in the unit 'view' but the front end does not say what it shows of a picture; "
                    "use unit 'share' or a front end with views",
                    "box",
                )
            return region.view
        return View(1 / width, 1 / height)

    def _pattern(self) -> re.Pattern[str]:
        """The form as a pattern, tolerant of spaces."""
        pattern = re.escape(self.form.format(x0="\0x0", y0="\0y0", x1="\0x1", y1="\0y1")).replace(r"\ ", r"\s*")
        for name in NAMES:
            pattern = pattern.replace(re.escape("\0") + name, rf"\s*(?P<{name}>-?\d+(?:\.\d+)?|-?\.\d+)\s*")
        return re.compile(pattern)


NAMES = ("x0", "y0", "x1", "y1")


def _seen(values: XYXY, box: Box, where: str) -> XYXY:
    x0, y0, x1, y1 = (min(1.0, max(0.0, v)) for v in values)
    if values[2] < 0 or values[3] < 0 or values[0] > 1 or values[1] > 1:
        told = ", ".join(f"{v:.2f}" for v in values)
        raise DataError(
            f"{where}: box {box.xyxy} of picture {box.image} is cut away: in shares of what the model sees it is "
            f"({told}), and only 0 to 1 is seen; use fit 'pad' or 'squash', or leave the box out",
            "box",
        )
    return x0, y0, x1, y1


def seen_regions(messages: Sequence[Message], items: Sequence[MediaItem], front_end: Any, id: str) -> list[Region]:
    """The region of each picture of a conversation. ``items`` are its media as the front ends gave them."""
    media = [medium for message in messages for medium in message.media]
    chosen = [(medium, item) for medium, item in zip(media, items, strict=True) if item.kind == "image"]
    found = []
    for number, (medium, item) in enumerate(chosen):
        place = Place(id, number, len(chosen))
        see = getattr(front_end, "views", None)
        if see is None:
            found.append(Region(item.layout.original))
            continue
        (height, width), true = item.layout.original, front_end.size(medium, place)
        view = see(item.layout.original, place)[0]
        # The opened picture has other pixels than the file only where the decoder itself shrinks it (``draft``).
        opened = View(width / true[1], height / true[0])
        found.append(Region(true, opened.then(view.scale_x, view.scale_y, view.left, view.top)))
    return found


def region_of(box: Box, regions: Sequence[Region], id: str) -> Region:
    """The region of a box's picture. Raises DataError."""
    if not 0 <= box.image < len(regions):
        raise DataError(f"sample {id!r}: a box names picture {box.image}, the conversation has {len(regions)}", "box")
    return regions[box.image]
