"""ViLT's pixels against ``ViltImageProcessorPil``: sizes, values and padding, one by one and in a batch, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from chiasm.errors import DataError
from chiasm.processing.base import Place
from chiasm.processing.collate import collate
from chiasm.processing.proportional import ProportionalFrontEnd
from chiasm.types import Image, MediaItem, Sample

pytest.importorskip("transformers")
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

THEIRS = ViltImageProcessorPil(size={"shortest_edge": 96}, size_divisor=32)
OURS = ProportionalFrontEnd(ProportionalFrontEnd.Config(shortest_edge=96))
SIZES = [(96, 96), (33, 35), (640, 427), (427, 640), (100, 160), (161, 100), (1000, 620), (97, 331)]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(width: int, height: int) -> MediaItem:
    return OURS(Image(noise(width, height)), Place("s", 0, 1))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_equal(width: int, height: int) -> None:
    found = item(width, height)
    expected = THEIRS(Pillow.fromarray(noise(width, height)), return_tensors="pt")
    assert torch.equal(found.inputs, expected["pixel_values"]) and bool(expected["pixel_mask"].all())
    assert found.layout.shape == tuple(found.inputs.shape[1:]) and found.layout.original == (height, width)
    assert OURS.layout(Image(noise(width, height)), Place("s", 0, 1)) == found.layout


def test_sizes_of_the_published_model() -> None:
    """384 on the shorter side, at most 608 on the longer: int(1333 / 800 · 384) = 639, cut down to 19 patches."""
    config = ProportionalFrontEnd.Config()
    assert config.size(480, 640) == (384, 512)
    assert config.size(384, 384) == (384, 384)
    assert config.size(100, 1000) == (64, 608)
    assert config.size(600, 400) == (576, 384)


def test_a_batch_is_filled_with_zeros() -> None:
    sizes = [(640, 427), (100, 160), (96, 96)]
    pictures = [Pillow.fromarray(noise(*size)) for size in sizes]
    expected = THEIRS(pictures, return_tensors="pt")
    samples = []
    for number, size in enumerate(sizes):
        medium = item(*size)
        medium.slots = torch.zeros(0, dtype=torch.long)
        samples.append(Sample(str(number), torch.ones(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), [medium]))
    media = collate(samples, 0).media["image"]
    assert torch.equal(media.inputs, expected["pixel_values"])
    for layout, mask in zip(media.layouts, expected["pixel_mask"], strict=True):
        assert (int(mask[:, 0].sum()), int(mask[0].sum())) == layout.shape[1:]


def test_a_strip_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"sample 's', medium 1 of 1: a picture of 10x900 pixels .* holds no patch of 32"
    ):
        item(900, 10)
