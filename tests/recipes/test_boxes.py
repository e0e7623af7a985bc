"""Boxes follow every resize, pad, crop and tile: a painted rectangle is looked for in the pixels of each unit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from tiny_run import tiny_vlm

from chiasm.errors import DataError
from chiasm.processing.base import Place
from chiasm.processing.box import BoxFormat, Region
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.sketch import sketching
from chiasm.types import Box, Image

FORM = "({x0}, {y0}, {x1}, {y1})"  # the characters that the tiny tokenizer has
SIZE = 64
TILING = {"pinpoints": [(64, 128), (128, 64), (128, 128), (192, 64)], "axes": "wh"}
FITS = {
    "squash": {"fit": "squash"},
    "pad": {"fit": "pad"},
    "crop": {"fit": "crop"},
    "pad, then the centre": {"fit": "pad", "shortest_edge": 80},
    "crop of a larger edge": {"fit": "crop", "shortest_edge": 77, "crop_rounding": "round"},
    "tiles": {"fit": "crop", "tiling": TILING},
    "squashed tiles": {"fit": "squash", "tiling": TILING},
}


def front_end(**settings) -> ImageFrontEnd:
    return ImageFrontEnd(ImageFrontEnd.Config(size=SIZE, resample="nearest", pad_color=(0, 0, 0), **settings))


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Pillow.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Pillow.fromarray(pixels)


def found(unit: Pillow.Image) -> tuple[float, float, float, float] | None:
    """The bright rectangle of a unit, in shares of its side."""
    rows, columns = np.nonzero(np.asarray(unit)[:, :, 0] > 127)
    if not len(rows):
        return None
    return columns.min() / SIZE, rows.min() / SIZE, (columns.max() + 1) / SIZE, (rows.max() + 1) / SIZE


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (257, 101), (64, 64), (90, 333)])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("several", [1, 2])
def test_the_map_of_each_unit_finds_the_painted_box(fit, size, several):
    width, height = size
    box = (int(width * 0.3), int(height * 0.4), int(width * 0.7), int(height * 0.9))
    end, place = front_end(several="pad", **FITS[fit]), Place("s", 0, several)
    units = end.units(painted(width, height, box), place)
    maps = end.views((height, width), place)
    assert len(maps) == len(units) == end.layout(Image(painted(width, height, box)), place).units
    shown = 0
    for unit, view in zip(units, maps, strict=True):
        seen = found(unit)
        wanted = tuple(min(1.0, max(0.0, v)) for v in view.apply(box))
        if seen is None:
            assert wanted[2] - wanted[0] < 1.5 / SIZE or wanted[3] - wanted[1] < 1.5 / SIZE
            continue
        shown += 1
        # A pixel of the unit at each side, and two where "round" moves the odd rest of a margin.
        assert np.allclose(seen, wanted, atol=1.6 / SIZE), (seen, wanted)
    assert shown


@given(
    fit=st.sampled_from(list(FITS)),
    width=st.integers(8, 2000),
    height=st.integers(8, 2000),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=60, deadline=None)
def test_there_and_back(fit, width, height, shares):
    x0, x1 = sorted((shares[0] * width, shares[1] * width))
    y0, y1 = sorted((shares[2] * height, shares[3] * height))
    for view in front_end(**FITS[fit]).views((height, width), Place("s", 0, 1)):
        assert np.allclose(view.to_original(view.apply((x0, y0, x1, y1))), (x0, y0, x1, y1), atol=1e-6)


@pytest.mark.parametrize("unit", ["share", "square", "view", "bins", "pixel"])
@pytest.mark.parametrize("fit", ["squash", "pad", "tiles"])
def test_an_answer_comes_back_in_the_picture_s_pixels(unit, fit):
    view = front_end(**FITS[fit]).views((200, 300), Place("s", 0, 1))[0]
    region, written = Region((200, 300), view), BoxFormat(unit=unit, digits=4)
    text = written.write(Box((30, 40, 200, 150)), region, "s")
    back = written.read(f"The cat is at {text}, the dog at {text.replace(' ', '')}. [1] [2, 3]", region)
    assert len(back) == 2
    for xyxy in back:
        assert np.allclose(xyxy, (30, 40, 200, 150), atol=0.5)


def test_square_is_the_view_of_a_padded_picture():
    view = front_end(fit="pad").views((200, 300), Place("s", 0, 1))[0]
    box, region = Box((30, 40, 200, 150)), Region((200, 300), view)
    assert BoxFormat(unit="square").write(box, region, "s") == BoxFormat(unit="view").write(box, region, "s")
    assert BoxFormat(unit="square").write(box, (200, 300), "s") == "[0.10, 0.30, 0.67, 0.67]"  # (40 + 50) / 300


def test_a_crop_keeps_the_part_that_is_seen_and_refuses_the_rest():
    view = front_end(fit="crop").views((200, 400), Place("s", 0, 1))[0]  # the middle 200 columns are seen
    region, format = Region((200, 400), view), BoxFormat(unit="view")
    assert format.write(Box((50, 0, 200, 100)), region, "s") == "[0.00, 0.00, 0.50, 0.50]"
    with pytest.raises(DataError, match=r"box \(0.0, 0.0, 90.0, 100.0\) of picture 0 is cut away.*use fit 'pad'"):
        format.write(Box((0.0, 0.0, 90.0, 100.0)), region, "s")


def test_the_processor_writes_and_reads_them(tmp_path):
    vlm = tiny_vlm(tmp_path)
    config = vlm.processor.config.edit(**{"box.unit": "view", "box.form": FORM, "media.image.fit": "pad"})
    processor = type(vlm.processor)(config, vlm.processor.tokenizer, vlm.processor.counter)
    picture = Pillow.new("RGB", (300, 200))
    asked = {"role": "user", "content": [{"type": "image", "image": picture}, "Where?"]}
    answer = {"role": "assistant", "content": [{"type": "box", "box": [30, 40, 200, 150]}]}
    sample = processor([asked, answer], id="s", train=True)
    text = processor.decode(sample.input_ids[sample.loss_mask])
    assert text.strip().startswith("(0.10, 0.30, 0.67, 0.67)")
    (box,) = processor.boxes(text, [asked])
    assert box.image == 0 and np.allclose(box.xyxy, (30, 40, 200, 150), atol=1.6)


def test_boxes_are_in_the_file_s_pixels_where_the_decoder_shrinks_it(tmp_path):
    path = tmp_path / "a.jpg"
    Pillow.new("RGB", (640, 480), (200, 10, 10)).save(path)
    vlm = tiny_vlm(tmp_path)
    config = vlm.processor.config.edit(**{"media.image.draft": True, "box.unit": "pixel", "box.form": FORM})
    processor = type(vlm.processor)(config, vlm.processor.tokenizer, vlm.processor.counter)
    content = [{"type": "image", "image": str(path)}, {"type": "box", "box": [320, 240, 640, 480]}]
    sample = processor([{"role": "user", "content": content}], id="s")
    assert sample.media[0].layout.original != (480, 640)
    assert "(320, 240, 640, 480)" in processor.decode(sample.input_ids)
    share = type(vlm.processor)(config.edit(**{"box.unit": "share"}), processor.tokenizer, processor.counter)
    assert "(0.50, 0.50, 1.00, 1.00)" in share.decode(share([{"role": "user", "content": content}]).input_ids)


def test_a_sketch_is_the_sample_without_its_pixels(tmp_path):
    vlm = tiny_vlm(tmp_path)
    path = tmp_path / "a.png"
    Pillow.new("RGB", (30, 20)).save(path)
    asked = {"role": "user", "content": [{"type": "image", "image": str(path)}, "What?"]}
    talk = [asked, {"role": "assistant", "content": "red"}]
    whole, sketch = vlm.processor(talk, id="s", train=True), sketching(vlm.processor)(talk, id="s", train=True)
    assert whole.input_ids.equal(sketch.input_ids) and whole.loss_mask.equal(sketch.loss_mask)
    assert whole.media[0].layout == sketch.media[0].layout and whole.media[0].slots.equal(sketch.media[0].slots)
    assert sketch.media[0].inputs.device.type == "meta" and sketch.media[0].inputs.shape == whole.media[0].inputs.shape
