"""Our pixels against the PIL image processors of transformers: equal bit by bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageOps

from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.types import Image

pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

S = 56
POINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SQUARES = [[56 * a, 56 * b] for a in range(1, 4) for b in range(1, 4)]
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
THEIR_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
EDGE = {"size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}}

CASES = {
    "clip": ({"size": S}, CLIPImageProcessorPil(**EDGE)),
    "clip, larger edge": (
        {"size": S, "shortest_edge": 64},
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": S, "width": S}),
    ),
    "clip, bilinear": ({"size": S, "resample": "bilinear"}, CLIPImageProcessorPil(**EDGE, resample=2)),
    "siglip": (
        {"size": S, "fit": "squash", **HALF},
        SiglipImageProcessorPil(size={"height": S, "width": S}, **THEIR_HALF),
    ),
    "llava": ({"size": S}, LlavaImageProcessorPil(**EDGE)),
    "llava, padded": ({"size": S, "fit": "pad"}, LlavaImageProcessorPil(**EDGE, do_pad=True)),
    "llava-next": (
        {"size": S, "tiling": {"pinpoints": POINTS, "axes": "hw"}},
        LlavaNextImageProcessorPil(**EDGE, image_grid_pinpoints=POINTS),
    ),
    "llava-onevision": (
        {"size": S, "fit": "squash", "several": "pad", "tiling": {"pinpoints": SQUARES, "axes": "hw"}, **HALF},
        LlavaOnevisionImageProcessorPil(
            size={"height": S, "width": S}, image_grid_pinpoints=SQUARES, do_pad=False, **THEIR_HALF
        ),
    ),
}
SIZES = [(1, 1), (3, 200), (200, 3), (56, 56), (57, 91), (101, 64), (112, 56), (333, 250), (35, 245)]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_equal(case, width, height):
    options, theirs = CASES[case]
    ours = ImageFrontEnd(ImageFrontEnd.Config.parse(options))
    pixels = noise(width, height)
    item = ours(Image(pixels), Place("s", 0, 1))
    expected = theirs(Pillow.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert torch.equal(item.inputs, expected.reshape(-1, 3, S, S))
    assert item.inputs.dtype == torch.float32 and item.inputs.is_contiguous()
    assert item.layout.units == len(item.inputs)
    assert item.layout.original == (height, width)


def test_several_pictures_equal_onevision():
    """Nested pictures are padded to squares and not cut; alone, the same picture is cut into tiles."""
    options, theirs = CASES["llava-onevision"]
    ours = ImageFrontEnd(ImageFrontEnd.Config.parse(options))
    pictures = [noise(57, 91), noise(112, 56)]
    expected = theirs([[Pillow.fromarray(p) for p in pictures]], return_tensors="pt")["pixel_values"]
    for index, picture in enumerate(pictures):
        item = ours(Image(picture), Place("s", index, 2))
        assert item.layout.units == 1 and item.layout.grid == (0, 0)
        assert torch.equal(item.inputs, expected[index])
        assert ours(Image(picture), Place("s", 0, 1)).layout.units > 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_on_white_equals_transformers(mode):
    rgba = np.dstack([noise(60, 70), noise(60, 70)[..., 0]])
    image = Pillow.fromarray(rgba)
    stream = io.BytesIO()
    (image.quantize(16) if mode == "P" else image.convert(mode)).save(stream, "PNG")
    image = Pillow.open(stream)
    assert image.mode == mode
    ours = ImageFrontEnd(ImageFrontEnd.Config(size=S, alpha="white"))
    item = ours(Image(image), Place("s", 0, 1))
    expected = CLIPImageProcessorPil(**EDGE)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(item.inputs, expected)
    dropped = ImageFrontEnd(ImageFrontEnd.Config(size=S))(Image(image), Place("s", 0, 1)).inputs
    plain = CLIPImageProcessorPil(**EDGE)(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(dropped, plain) and not torch.equal(dropped, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_transposes(orientation):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Pillow.fromarray(noise(57, 91)).save(stream, "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Pillow.open(io.BytesIO(stream.getvalue())))
    expected = CLIPImageProcessorPil(**EDGE)(upright, return_tensors="pt")["pixel_values"]
    ours = ImageFrontEnd(ImageFrontEnd.Config(size=S))
    item = ours(Image(stream.getvalue()), Place("s", 0, 1))
    assert torch.equal(item.inputs, expected)
    assert item.layout.original == (upright.height, upright.width)
    assert ours.layout(Image(stream.getvalue()), Place("s", 0, 1)) == item.layout


@pytest.mark.data
@pytest.mark.parametrize("name", ["cs_cats.jpg", "kodak03.jpg", "sk_camera.png", "sk_horse.png"])
def test_photos_equal(shared_data, name):
    path = shared_data / "photos/images" / name
    for options, theirs in CASES.values():
        ours = ImageFrontEnd(ImageFrontEnd.Config.parse(options))
        expected = theirs(Pillow.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.equal(ours(Image(path), Place(name, 0, 1)).inputs, expected.reshape(-1, 3, S, S))
