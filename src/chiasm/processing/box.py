"""Regions as text: a box in pixels of a picture, written the way a model was taught to read and answer it."""

from __future__ import annotations

from typing import Literal

from chiasm.config import Config
from chiasm.errors import DataError
from chiasm.types import Box


class BoxFormat(Config):
    """How a box is written.

    ``unit="share"``: shares of the picture's width and height, 0 to 1 (LLaVA, Shikra). ``"square"``: shares of the side
    of the square that the picture is padded to (LLaVA-1.5).
    ``"bins"``: whole numbers 0 to ``bins`` (PaLI-Gemma, Qwen-VL).
    ``"pixel"``: pixels of the original picture.
    """

    unit: Literal["share", "square", "bins", "pixel"] = "share"
    digits: int = 2  # decimals of a share
    bins: int = 1000
    form: str = "[{x0}, {y0}, {x1}, {y1}]"

    def write(self, box: Box, original: tuple[int, int], where: str) -> str:
        """The text of a box in a picture of ``(height, width)`` pixels. Raises DataError where it lies outside."""
        height, width = original
        x0, y0, x1, y1 = box.xyxy
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise DataError(
                f"{where}: box {box.xyxy} does not lie in picture {box.image} of {width} x {height} pixels; give x0, "
                f"y0, x1, "
                "y1 in pixels of the original picture"
            )
        left = top = 0.0
        if self.unit == "square":
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            width = height = side
        values = ((x0 + left) / width, (y0 + top) / height, (x1 + left) / width, (y1 + top) / height)
        if self.unit == "pixel":
            written = [str(round(v)) for v in box.xyxy]
        elif self.unit == "bins":
            written = [str(round(v * self.bins)) for v in values]
        else:
            written = [f"{v:.{self.digits}f}" for v in values]
        return self.form.format(x0=written[0], y0=written[1], x1=written[2], y1=written[3])
