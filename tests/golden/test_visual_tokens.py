"""The token tables of the LLaVA family, and the resolutions and pixels of golden files that others made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from chiasm.fusion.merge import Flat, Frames, SpatialUnpad
from chiasm.fusion.pool import Pool
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.tiling import Tiling, pinpoints
from chiasm.types import Count, Image, Layout

NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ALONE = Place("s", 0, 1)


def unpad_tokens(width: int, height: int, axes: str, system: str) -> int:
    if system == "next":
        size, side, points, limit = 336, 24, NEXT, None
    else:
        size, side, points, limit = 384, 27, pinpoints("(1x1),...,(6x6)", 384), 9
    rounding = "trunc" if axes == "wh" else "round"
    merge = SpatialUnpad.Config(rounding=rounding, max_tiles=limit)
    rows, columns = Tiling(pinpoints=points, axes=axes).grid((height, width), size)
    layout = Layout(1 + rows * columns, (3, size, size), (rows, columns), (height, width))
    return merge.count(layout, Count(side * side, (side, side)))


# width, height, LLaVA-NeXT in LLaVA's convention, in that of transformers, LLaVA-OneVision (the same in both)
TABLE = [
    (640, 480, 2340, 2340, 2929),
    (1024, 899, 2634, 2634, 6551),
    (1920, 1080, 1948, 1948, 7269),
    (672, 672, 2928, 2928, 3699),
    (1000, 300, 2182, 2182, 2779),
    (500, 375, 2340, 2340, 1728),
    (384, 384, 2928, 2928, 1485),
    (336, 336, 1176, 1176, 1485),
    (320, 240, 1026, 1368, 1317),
    (336, 224, 976, 1464, None),
    (200, 100, 876, 1752, None),
    (748, 352, 1800, 1848, None),
    (316, 503, 1526, 1526, 1905),
    (4000, 3000, 2340, 2340, 7309),
    (960, 1160, None, None, 8765),
]


@pytest.mark.parametrize(("width", "height", "llava", "transformers", "onevision"), TABLE)
def test_anyres_token_table(width, height, llava, transformers, onevision):
    if llava is not None:
        assert unpad_tokens(width, height, "wh", "next") == llava
        assert unpad_tokens(width, height, "hw", "next") == transformers
    if onevision is not None:
        assert unpad_tokens(width, height, "wh", "onevision") == onevision
        assert unpad_tokens(width, height, "hw", "onevision") == onevision


@pytest.mark.parametrize(("width", "height"), [row[:2] for row in TABLE])
@pytest.mark.parametrize(("size", "patch", "fit", "tokens"), [(224, 14, "crop", 256), (336, 14, "pad", 576)])
def test_single_unit_table(width, height, size, patch, fit, tokens):
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=size, fit=fit))
    layout = front_end.layout(Image(np.zeros((height, width, 3), np.uint8)), ALONE)
    side = size // patch
    assert Flat.Config().count(layout, Count(side * side, (side, side))) == tokens


@pytest.mark.parametrize(
    ("mode", "side", "per_frame"), [("average", 24, 144), ("bilinear", 27, 196), ("average", 27, 169), ("max", 27, 169)]
)
@pytest.mark.parametrize("frames", [1, 8, 32])
def test_video_token_table(mode, side, per_frame, frames):
    unit = Pool(mode=mode, stride=2).count(Count(side * side, (side, side)))
    layout = Layout(frames, (3, 1, 1))
    half = int(per_frame**0.5)
    expected = {
        "none": per_frame * frames,
        "one_token": per_frame * frames + 1,
        "frame": (per_frame + 1) * frames,
        "grid": half * (half + 1) * frames,
    }
    assert {kind: Frames.Config(newline=kind).count(layout, unit) for kind in expected} == expected


def test_rounding_differs_where_the_reference_says():
    """Of all sizes scanned in the reference, few differ; these are among them, and nearby sizes do not."""

    def kept(width, height, rounding):
        rows, columns = Tiling(pinpoints=NEXT).grid((height, width), 336)
        layout = Layout(1 + rows * columns, (3, 336, 336), (rows, columns), (height, width))
        return SpatialUnpad.Config(rounding=rounding).kept(layout, Count(576, (24, 24)))

    for width, height in [(748, 352), (352, 748), (799, 376), (836, 352), (924, 352)]:
        assert kept(width, height, "trunc") != kept(width, height, "round")
        assert kept(width + 1, height, "trunc") == kept(width + 1, height, "round")


def test_grid_text_gives_the_36_pairs():
    pairs = pinpoints("(1x1),...,(6x6)", 384)
    assert pairs == tuple((384 * a, 384 * b) for a in range(1, 7) for b in range(1, 7))


@pytest.mark.data
def test_best_resolution_golden(shared_data):
    golden = json.loads((shared_data / "golden_eval/preprocess/resolution_golden.json").read_text())
    tiling = Tiling(pinpoints=golden["llava_next_grid_pinpoints"], axes="wh")
    for row in golden["sizes"]:
        height, width = tiling.best((row["height"], row["width"]))
        assert [width, height] == row["llava_next_best_resolution"], row
        rows, columns = tiling.grid((row["height"], row["width"]), 336)
        assert [columns, rows] == row["llava_next_grid_336"]


@pytest.mark.data
@pytest.mark.parametrize("name", ["images/sk_chelsea.png", "images/kodak19.jpg", "images/sk_coffee.png"])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("clip_resize224_centercrop", {"size": 224, "fit": "crop", "crop_rounding": "round"}),
        ("clip_resize336_centercrop", {"size": 336, "fit": "crop", "crop_rounding": "round"}),
        ("llava15_pad_resize336", {"size": 336, "fit": "pad"}),
    ],
)
def test_pixels_golden(shared_data, name, key, options):
    golden = json.loads((shared_data / "golden_eval/preprocess/pixel_golden.json").read_text())["images"][name]
    path = shared_data / "photos" / name
    front_end = ImageFrontEnd(ImageFrontEnd.Config(**options))
    image = front_end.open(path, ALONE)
    assert list(image.size) == golden["size"]
    expected, (unit,) = golden[key], front_end.units(image, ALONE)
    assert int(np.asarray(unit, np.int64).sum()) == expected["uint8_sum"]
    x = front_end(Image(str(path)), ALONE).inputs[0]
    assert list(x.shape) == expected["shape"]
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor(expected["mean"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((1, 2), correction=0), torch.tensor(expected["std"]), atol=1e-5, rtol=0)
