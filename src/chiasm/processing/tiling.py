"""AnyRes: a picture is fitted into the best of a list of resolutions and cut into tiles.

Papers: LLaVA-NeXT (2024); LLaVA-OneVision (arXiv:2408.03326). Reference: haotian-liu/LLaVA ``mm_utils.py`` c121f04, and
``transformers.image_processing_utils``. The two read the same list with the axes exchanged, which matters where two
resolutions are equally good: the first of the list wins, and that is another one. ``Tiling.axes`` says which is meant.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from PIL import Image as Pillow

from chiasm.config import Config
from chiasm.errors import ConfigError


class Tiling(Config):
    """The resolutions a picture may be fitted into, in pixels, exactly as the checkpoint stores them.

    ``axes`` is the order of each pair: ``"wh"`` in LLaVA's own checkpoints, ``"hw"`` in those of transformers.
    """

    pinpoints: tuple[tuple[int, int], ...]
    axes: Literal["wh", "hw"] = "wh"

    def sizes(self) -> list[tuple[int, int]]:
        """The resolutions as (height, width), in the order of the list."""
        return [pair if self.axes == "hw" else (pair[1], pair[0]) for pair in self.pinpoints]

    def check(self, size: int) -> None:
        """Raises ConfigError where a resolution is not made of whole tiles of ``size`` pixels."""
        if not self.pinpoints:
            raise ConfigError("tiling.pinpoints is empty; give at least one resolution, or tiling: null")
        for height, width in self.sizes():
            if height < size or width < size or height % size or width % size:
                raise ConfigError(
                    f"tiling: {width}x{height} (width x height) is not made of whole tiles of {size}x{size} pixels; "
                    "the pinpoints and size belong to different encoders"
                )

    def best(self, original: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that keeps most of the picture's pixels, then wastes least; the first of equals.

        ``original`` is the picture's (height, width).
        """
        high, wide = original
        chosen, most, least = (0, 0), -1, math.inf
        for height, width in self.sizes():
            scale = min(width / wide, height / high)
            kept = min(int(wide * scale) * int(high * scale), wide * high)
            waste = height * width - kept
            if kept > most or (kept == most and waste < least):
                chosen, most, least = (height, width), kept, waste
        return chosen

    def grid(self, original: tuple[int, int], size: int) -> tuple[int, int]:
        """(rows, columns) of tiles for a picture of (height, width) ``original``."""
        height, width = self.best(original)
        return height // size, width // size


def fitted(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture inside ``target`` with its proportions kept, rounded up, as both references do."""
    (high, wide), (height, width) = original, target
    if width / wide < height / high:
        return min(math.ceil(high * (width / wide)), height), width
    return height, min(math.ceil(wide * (height / high)), width)


def cut(image: Pillow.Image, tiling: Tiling, size: int, resample: Pillow.Resampling) -> list[Pillow.Image]:
    """The tiles of an RGB picture, row by row: resized into the best resolution, centred on black, cut."""
    target = tiling.best((image.height, image.width))
    height, width = fitted((image.height, image.width), target)
    canvas = Pillow.new("RGB", (target[1], target[0]))
    canvas.paste(image.resize((width, height), resample), ((target[1] - width) // 2, (target[0] - height) // 2))
    return [
        canvas.crop((left, top, left + size, top + size))
        for top in range(0, target[0], size)
        for left in range(0, target[1], size)
    ]


def pinpoints(grids: str, size: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's short form ``"(1x1),...,(6x6)"``: all products of the two ranges times ``size``, in its order."""
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", grids)]
    if not pairs:
        raise ConfigError(f"grids {grids!r} cannot be read; expected a text like '(1x1),...,(6x6)'")
    (first_a, first_b), (last_a, last_b) = pairs[0], pairs[-1]
    return tuple((a * size, b * size) for a in range(first_a, last_a + 1) for b in range(first_b, last_b + 1))
