"""Resizing, cutting out and normalising a picture in one call, bit by bit what Pillow and torch give.

Compiled (``native/pixels.cpp``), because it is half of the work of preparing a picture. Pillow 13 resizes along the
columns first where the height loses more than twice as many pixels as the width (python-pillow/Pillow#9549), older
versions along the rows first; which of the two the installed one does is tried out once, and where neither gives its
pixels, Pillow does the work.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from chiasm.nn import kernels

KINDS = {"bilinear": 0, "bicubic": 1}
# (height, width) to (height, width): both orders, larger and smaller, and where Pillow's rule changes
PROBES = (
    ((40, 30), (20, 20)), ((40, 30), (20, 21)), ((30, 40), (10, 29)), ((30, 40), (10, 31)), ((9, 50), (23, 11)),
    ((50, 9), (11, 23)), ((33, 17), (32, 31)), ((8, 8), (3, 5)), ((45, 45), (44, 44)), ((60, 21), (2, 3)),
)  # fmt: skip


def table(mean: Tensor, std: Tensor) -> Tensor:
    """What each byte becomes in each colour ``[3, 256]``; ``mean``, ``std [3, 1, 1]``."""
    values = torch.arange(256, dtype=torch.float32).expand(3, 1, -1).contiguous()
    return values.div_(255).sub_(mean).div_(std)[:, 0].contiguous()


def picture(
    image: Pillow.Image, size: tuple[int, int], part: tuple[int, int, int, int], kind: str, values: Tensor
) -> Tensor | None:
    """An RGB picture resized to ``size`` (height, width), ``part`` of it (top, left, rows, columns), each byte looked
    up in ``values [3, 256]`` → ``[3, rows, columns]`` float32. None where Pillow must do it.
    """
    rule = _rule() if kind in KINDS and image.mode == "RGB" else None
    return None if rule is None else _made(image, size, part, KINDS[kind], values, rule == "13")


def _made(
    image: Pillow.Image, size: tuple[int, int], part: tuple[int, int, int, int], kind: int, values: Tensor, new: bool
) -> Tensor:
    library: Any = kernels.compiled("pixels")
    (high, wide), (width, height) = size, image.size
    columns_first = new and high < height and height - high > 2 * (width - wide)
    out = torch.empty(3, part[2], part[3])
    library.chiasm_picture(
        ctypes.c_char_p(image.tobytes("raw", "RGBX")),
        *(ctypes.c_int64(n) for n in (height, width, high, wide, *part)),
        ctypes.c_int32(kind),
        ctypes.c_int32(columns_first),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


@functools.cache
def _rule() -> str | None:
    """How the installed Pillow resizes: "13", "rows" (always along the rows first), or None where neither fits."""
    if kernels.compiled("pixels") is None:
        return None
    same = torch.arange(256, dtype=torch.float32).expand(3, -1).contiguous()
    fits = {"13": True, "rows": True}
    for (height, width), (high, wide) in PROBES:
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Pillow.fromarray(noise)
        for kind, filter in enumerate((Pillow.Resampling.BILINEAR, Pillow.Resampling.BICUBIC)):
            wanted = torch.from_numpy(np.array(image.resize((wide, high), filter))).permute(2, 0, 1).float()
            for rule in fits:
                found = _made(image, (high, wide), (0, 0, high, wide), kind, same, rule == "13")
                fits[rule] &= torch.equal(found, wanted)
    return next((rule for rule, good in fits.items() if good), None)
