"""Pictures prepared in one compiled call against Pillow and torch, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.processing import pixels
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.types import Image as Picture

compiled = pytest.mark.skipif(pixels._rule() is None, reason="no C++ compiler, or another Pillow: it does the work")
PLACE = Place("s", 0, 1)


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 997 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@compiled
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_any_size_and_part(kind: str):
    draw = np.random.default_rng(3)
    same = torch.arange(256, dtype=torch.float32).expand(3, -1).contiguous()
    for _ in range(120):
        height, width, high, wide = (int(n) for n in draw.integers(1, 130, 4))
        rows, columns = int(draw.integers(1, high + 1)), int(draw.integers(1, wide + 1))
        top, left = int(draw.integers(0, high - rows + 1)), int(draw.integers(0, wide - columns + 1))
        image = noise(height, width)
        found = pixels.picture(image, (high, wide), (top, left, rows, columns), kind, same)
        whole = image.resize((wide, high), Image.Resampling[kind.upper()])
        wanted = np.array(whole.crop((left, top, left + columns, top + rows))).transpose(2, 0, 1)
        assert found is not None and np.array_equal(found.numpy(), wanted), (height, width, high, wide)


@compiled
@pytest.mark.parametrize(
    "changes",
    [
        {"size": 32},
        {"size": 33, "crop_rounding": "round", "resample": "bilinear"},
        {"size": 32, "shortest_edge": 40},
        {"size": 32, "fit": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"size": 30, "fit": "squash", "shortest_edge": 37},
    ],
    ids=str,
)
def test_front_ends_give_the_same_tensors(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    front = ImageFrontEnd(ImageFrontEnd.Config(**changes))
    pictures = [noise(*sides) for sides in ((64, 48), (48, 64), (32, 32), (20, 500), (333, 21), (5, 7), (41, 40))]
    pictures += [noise(40, 50).convert(mode) for mode in ("L", "P", "CMYK", "RGBA")]
    found = [front(Picture(picture), PLACE) for picture in pictures]
    monkeypatch.setattr(pixels, "_rule", lambda: None)
    for mine, picture in zip(found, pictures, strict=True):
        plain = front(Picture(picture), PLACE)
        assert torch.equal(mine.inputs, plain.inputs) and mine.layout == plain.layout
        assert mine.inputs.is_contiguous() and mine.inputs.dtype == torch.float32


@compiled
def test_another_pillow_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """A Pillow whose pixels neither rule gives does the work itself."""
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args, **options: real(self, *args, **options).rotate(180))
    pixels._rule.cache_clear()
    assert pixels._rule() is None
    assert pixels.picture(noise(9, 9), (4, 4), (0, 0, 4, 4), "bicubic", torch.zeros(3, 256)) is None
    monkeypatch.undo()
    pixels._rule.cache_clear()
    assert pixels._rule() in ("13", "rows")
