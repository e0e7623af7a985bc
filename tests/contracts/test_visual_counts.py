"""What is counted before the model runs is what the merge gives, for any picture; and tiles show the right part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from chiasm import registry
from chiasm.errors import ConfigError
from chiasm.fusion.merge import Frames, SpatialUnpad
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.tiling import Tiling, cut, fitted
from chiasm.types import Count, Image, Layout

SIZE, PATCH = 28, 4
SIDE = SIZE // PATCH
UNIT = Count(SIDE * SIDE, (SIDE, SIDE))
POINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
SQUARES = tuple((28 * a, 28 * b) for a in range(1, 5) for b in range(1, 5))
NEWLINE = torch.tensor([-1.0, -2.0, -3.0])

MERGES = [
    {"type": "flat"},
    {"type": "spatial"},
    {"type": "spatial", "base": False, "max_pool": 2},
    {"type": "spatial_unpad", "rounding": "trunc"},
    {"type": "spatial_unpad", "rounding": "round"},
    {"type": "spatial_unpad", "rounding": "trunc", "max_tiles": 1},
    {"type": "spatial_unpad", "rounding": "round", "max_tiles": 9},
]
FRONT_ENDS = [
    {"size": SIZE, "tiling": {"pinpoints": POINTS, "axes": axes}, "several": several}
    for axes in ("wh", "hw")
    for several in ("tile", "pad", "single")
] + [{"size": SIZE, "fit": "squash", "tiling": {"pinpoints": SQUARES}}, {"size": SIZE, "fit": "pad"}]

# From 1x1 to 7:1 as the issue asks, and strips beyond anything a camera makes.
sides = st.integers(1, 900)
ratios = st.floats(1 / 7, 7)


def patches(inputs: torch.Tensor) -> torch.Tensor:
    """A stand-in for encoder and connector: ``[U, 3, s, s]`` → the mean colour of each patch, ``[U, N, 3]``."""
    return torch.nn.functional.avg_pool2d(inputs, PATCH).flatten(2).transpose(1, 2)


def check(front_end: ImageFrontEnd, merge: dict, width: int, height: int, place: Place) -> None:
    item = front_end(Image(np.zeros((height, width, 3), np.uint8)), place)
    assert front_end.layout(Image(Pillow.new("RGB", (width, height))), place) == item.layout
    assert len(item.inputs) == item.layout.units == max(1, 1 + item.layout.grid[0] * item.layout.grid[1])
    part = registry.get("merge", merge["type"])
    config = part.Config.parse(merge)
    merged = part(config)(patches(item.inputs), UNIT, item.layout, NEWLINE)
    assert len(merged) == config.count(item.layout, UNIT) > 0


@settings(max_examples=80, deadline=None)
@given(sides, ratios, st.sampled_from(FRONT_ENDS), st.sampled_from(MERGES), st.integers(1, 5))
def test_counted_is_produced(side, ratio, options, merge, several):
    front_end = ImageFrontEnd(ImageFrontEnd.Config.parse(options))
    for index in range(several):
        check(front_end, merge, side, max(1, round(side * ratio)), Place("s", index, several))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(200, 4000), st.booleans(), st.sampled_from(MERGES))
def test_strips_keep_at_least_a_row(short, long, tall, merge):
    width, height = (short, long) if tall else (long, short)
    check(ImageFrontEnd(ImageFrontEnd.Config.parse(FRONT_ENDS[0])), merge, width, height, Place("s", 0, 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([POINTS, SQUARES]), st.sampled_from(["wh", "hw"]))
def test_best_resolution_is_best(width, height, points, axes):
    """Checked against the definition by itself: most pixels kept, then least waste, then first in the list."""
    tiling = Tiling(pinpoints=points, axes=axes)

    def key(size):
        scale = min(size[1] / width, size[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return (-kept, size[0] * size[1] - kept)

    assert tiling.best((height, width)) == min(tiling.sizes(), key=key)  # min takes the first of equals
    high, wide = fitted((height, width), tiling.best((height, width)))
    assert 1 <= high <= tiling.best((height, width))[0] and 1 <= wide <= tiling.best((height, width))[1]


def test_ties_go_to_the_first_of_the_list_in_each_convention():
    assert Tiling(pinpoints=((336, 672), (672, 336)), axes="wh").grid((240, 320), 336) == (2, 1)
    assert Tiling(pinpoints=((336, 672), (672, 336)), axes="hw").grid((240, 320), 336) == (1, 2)


def test_tiles_are_in_reading_order_and_centred_on_black():
    """A picture whose red says the column and green the row: each tile's mean says which part it is."""
    y, x = np.mgrid[:56, :84]
    picture = np.stack([40 + x * 2, 40 + y * 3, np.full_like(x, 200)], -1).astype(np.uint8)
    tiling = Tiling(pinpoints=((84, 56),), axes="wh")
    tiles = [np.asarray(t) for t in cut(Pillow.fromarray(picture), tiling, 28, Pillow.Resampling.BICUBIC)]
    assert len(tiles) == 6
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 3)
        assert np.array_equal(tile, picture[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28])
    # Half as high: 14 rows of black above and below, the picture's rows between.
    low = [np.asarray(t) for t in cut(Pillow.fromarray(picture[:28]), tiling, 28, Pillow.Resampling.BICUBIC)]
    whole = np.vstack([np.hstack(low[:3]), np.hstack(low[3:])])
    assert (whole[:14] == 0).all() and (whole[42:] == 0).all()
    assert np.array_equal(whole[14:42], picture[:28])


def test_merged_rows_follow_the_picture():
    """End to end: from pixels through tiles and merge, the rows of the map run as those of the picture do."""
    y, x = np.mgrid[:56, :84]
    picture = np.stack([x * 3, y * 4, np.zeros_like(x)], -1).astype(np.uint8)
    front_end = ImageFrontEnd(
        ImageFrontEnd.Config(size=SIZE, tiling=Tiling(pinpoints=((84, 56),)), mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    item = front_end(Image(picture), Place("s", 0, 1))
    merged = SpatialUnpad(SpatialUnpad.Config())(patches(item.inputs), UNIT, item.layout, NEWLINE)
    rows = merged[UNIT.tokens :].view(2 * SIDE, 3 * SIDE + 1, 3)
    assert torch.equal(rows[:, -1], NEWLINE.expand(2 * SIDE, 3))
    expected = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.avg_pool2d(expected, PATCH)[0].permute(1, 2, 0)
    torch.testing.assert_close(rows[:, :-1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("newline", ["none", "one_token", "frame", "grid"])
@pytest.mark.parametrize("frames", [1, 3])
def test_newlines_of_frames(newline, frames):
    unit = Count(6, (2, 3))
    x = torch.arange(frames * 6 * 3.0).view(frames, 6, 3)
    layout = Layout(frames, (3, 8, 12))
    config = Frames.Config(newline=newline)
    merged = Frames(config)(x, unit, layout, NEWLINE if config.needs_newline else None)
    assert len(merged) == config.count(layout, unit)
    ends = [i for i, row in enumerate(merged) if torch.equal(row, NEWLINE)]
    assert (
        ends
        == {
            "none": [],
            "one_token": [frames * 6],
            "frame": [7 * f + 6 for f in range(frames)],
            "grid": [4 * r + 3 for r in range(frames * 2)],
        }[newline]
    )
    kept = [i for i in range(len(merged)) if i not in ends]
    assert torch.equal(merged[kept], x.flatten(0, 1))


def test_merges_that_need_a_grid_say_so():
    layout, flat = Layout(3, (3, 28, 28), (1, 2), (20, 40)), Count(49, None)
    for merge in ({"type": "spatial"}, {"type": "spatial_unpad"}, {"type": "frames", "newline": "grid"}):
        config = registry.get("merge", merge["type"]).Config.parse(merge)
        with pytest.raises(ConfigError, match="49 tokens came without"):
            config.count(layout, flat)


@pytest.mark.parametrize("options", FRONT_ENDS)
def test_the_tensor_follows_the_picture(options):
    front_end = ImageFrontEnd(ImageFrontEnd.Config.parse(options))
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    item = front_end(Image(picture), Place("s", 0, 1))
    changed = picture.copy()
    changed[20:30, 30:40] = 255 - changed[20:30, 30:40]
    other = front_end(Image(changed), Place("s", 0, 1))
    assert item.layout == other.layout
    assert not torch.equal(item.inputs, other.inputs)
    assert all(not torch.equal(item.inputs, front_end(Image(p), Place("s", 0, 1)).inputs)
               for p in (picture[:, ::-1], picture[::-1], picture[..., ::-1]))  # fmt: skip
    assert torch.equal(item.inputs, front_end(Image(picture), Place("other", 0, 1)).inputs)


def test_crop_rounding_conventions():
    """An odd margin of 3: one pixel is cut off on the left by the floor, two by torchvision's rounding."""
    picture = np.zeros((16, 19, 3), np.uint8)
    picture[..., 0] = np.arange(19)
    for rounding, left in (("floor", 1), ("round", 2)):
        front_end = ImageFrontEnd(ImageFrontEnd.Config(size=16, crop_rounding=rounding))
        (unit,) = front_end.units(Pillow.fromarray(picture), Place("s", 0, 1))
        assert np.asarray(unit)[0, 0, 0] == left


def test_pad_colours():
    picture = Pillow.new("RGB", (10, 20), (9, 9, 9))
    half = (0.5, 0.5, 0.5)
    for options, colour in (
        ({}, (122, 116, 104)),
        ({"mean": half}, (127, 127, 127)),
        ({"pad_color": (1, 2, 3)}, (1, 2, 3)),
    ):
        front_end = ImageFrontEnd(ImageFrontEnd.Config(size=20, fit="pad", **options))
        (unit,) = front_end.units(picture, Place("s", 0, 1))
        assert tuple(np.asarray(unit)[10, 0]) == colour == tuple(np.asarray(unit)[10, 19])
        assert tuple(np.asarray(unit)[10, 10]) == (9, 9, 9)
