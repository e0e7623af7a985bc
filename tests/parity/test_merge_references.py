"""Merged tokens against ``pack_image_features`` of transformers, on features that say where they come from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chiasm.fusion.merge import Spatial, SpatialUnpad
from chiasm.processing.tiling import Tiling
from chiasm.types import Count, Layout

pytest.importorskip("transformers")
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

SIDE, SIZE = 6, 84  # tokens and pixels of a tile's side
UNIT = Count(SIDE * SIDE, (SIDE, SIDE))
POINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]
SQUARES = [[84 * a, 84 * b] for a in range(1, 5) for b in range(1, 5)]
SIZES = [(84, 84), (100, 60), (60, 100), (640, 480), (77, 539), (539, 77), (1, 1), (187, 88), (333, 331), (64, 48)]


def hosts(points):
    vision = SimpleNamespace(image_size=SIZE, patch_size=SIZE // SIDE)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=points))


def features(width, height, points):
    """``[U, N, 2]``: (unit, token) as values, so that every vector's origin shows in the result."""
    rows, columns = Tiling(pinpoints=points, axes="hw").grid((height, width), SIZE)
    layout = Layout(1 + rows * columns, (3, SIZE, SIZE), (rows, columns), (height, width))
    units, tokens = torch.meshgrid(torch.arange(layout.units), torch.arange(UNIT.tokens), indexing="ij")
    return torch.stack([units, tokens], dim=-1).float(), layout


NEWLINE = torch.tensor([-7.0, -9.0])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_unpad_equals_llava_next(width, height):
    x, layout = features(width, height, POINTS)
    (expected,), _ = LlavaNextModel.pack_image_features(hosts(POINTS), [x], [[height, width]], "default", NEWLINE)
    config = SpatialUnpad.Config(rounding="round")
    merged = SpatialUnpad(config)(x, UNIT, layout, NEWLINE)
    assert torch.equal(merged, expected)
    assert len(merged) == config.count(layout, UNIT)


@pytest.mark.parametrize("limit", [1, 2, 9])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_unpad_equals_onevision(width, height, limit):
    x, layout = features(width, height, SQUARES)
    (expected,), _ = LlavaOnevisionModel.pack_image_features(
        hosts(SQUARES), [x], [[height, width]], NEWLINE, f"anyres_max_{limit}"
    )
    config = SpatialUnpad.Config(rounding="round", max_tiles=limit)
    merged = SpatialUnpad(config)(x, UNIT, layout, NEWLINE)
    assert torch.equal(merged, expected)
    assert len(merged) == config.count(layout, UNIT)


def test_single_unit_gets_one_newline_at_the_end():
    x, layout = torch.arange(UNIT.tokens * 2.0).view(1, UNIT.tokens, 2), Layout(1, (3, SIZE, SIZE), (0, 0), (40, 50))
    (expected,), _ = LlavaNextModel.pack_image_features(hosts(POINTS), [x], [[40, 50]], "default", NEWLINE)
    merged = SpatialUnpad(SpatialUnpad.Config())(x, UNIT, layout, NEWLINE)
    assert torch.equal(merged, expected) and torch.equal(merged[-1], NEWLINE)


def reference_unpad(x, layout):
    """The steps written out in LLaVA's order and truncation, from the reference facts."""
    rows, columns = layout.grid
    tiles = x[1:].view(rows, columns, SIDE, SIDE, -1).permute(4, 0, 2, 1, 3)
    tiles = tiles.reshape(x.shape[-1], rows * SIDE, columns * SIDE)
    (height, width), (high, wide) = layout.original, tiles.shape[1:]
    if width / height > wide / high:
        border = (high - int(height * (wide / width))) // 2
        tiles = tiles[:, border : high - border]
    else:
        border = (wide - int(width * (high / height))) // 2
        tiles = tiles[:, :, border : wide - border]
    return tiles


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_unpad_with_truncation(width, height):
    x, layout = features(width, height, POINTS)
    tiles = reference_unpad(x, layout)
    ends = NEWLINE[:, None, None].expand(-1, tiles.shape[1], 1)
    expected = torch.cat([x[0], torch.cat([tiles, ends], dim=-1).flatten(1).T])
    config = SpatialUnpad.Config(rounding="trunc")
    assert torch.equal(SpatialUnpad(config)(x, UNIT, layout, NEWLINE), expected)
    assert config.count(layout, UNIT) == len(expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("pool", [None, 2])
def test_spatial(width, height, base, pool):
    x, layout = features(width, height, POINTS)
    rows, columns = layout.grid
    tiles = x[1:].view(rows, columns, SIDE, SIDE, -1).permute(0, 2, 1, 3, 4)  # the reference's other order of axes
    if pool:
        tiles = tiles.reshape(rows * SIDE, columns * SIDE, -1).permute(2, 0, 1)
        tiles = F.max_pool2d(tiles, pool).permute(1, 2, 0)
    expected = tiles.reshape(-1, x.shape[-1])
    expected = torch.cat([x[0], expected]) if base else expected
    config = Spatial.Config(base=base, max_pool=pool)
    assert torch.equal(Spatial(config)(x, UNIT, layout, None), expected)
    assert config.count(layout, UNIT) == len(expected)
    assert not config.needs_newline


def test_a_strip_keeps_a_row():
    """At 1:2000 transformers cuts every row off; here one pair stays, and the count says so."""
    x, layout = features(2000, 1, POINTS)
    (theirs,), _ = LlavaNextModel.pack_image_features(hosts(POINTS), [x], [[1, 2000]], "default", NEWLINE)
    assert len(theirs) == UNIT.tokens
    config = SpatialUnpad.Config(rounding="round", max_tiles=1)
    merged = SpatialUnpad(config)(x, UNIT, layout, NEWLINE)
    assert len(merged) == config.count(layout, UNIT) > UNIT.tokens
