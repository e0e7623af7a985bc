"""Opening pictures: every kind that can be, and one clear error for each that cannot."""

from __future__ import annotations

import base64
import io
import os
import pickle
import resource
import struct
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageFile

from chiasm.errors import ConfigError, DataError
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.open import open_picture, picture_size
from chiasm.types import Image

PLACE = Place("row-17", 1, 3)


def pixels(width: int = 40, height: int = 30) -> np.ndarray:
    """A gradient with a different slope in each channel, so that flips, turns and swapped channels all show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 250 // width, y * 250 // height, (x + 2 * y) * 80 // height], -1).astype(np.uint8)


def encoded(image: Pillow.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def opened(data, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning may pass for an answer
        image = open_picture(data, PLACE, **options)
    assert image.mode == "RGB"
    assert picture_size(data, PLACE) == (image.height, image.width)
    return np.asarray(image)


def png(width: int, height: int, body: bytes = b"", kind: int = 2) -> bytes:
    """A PNG by hand: its header may promise any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------- what can be opened


def test_every_way_of_giving_a_picture(tmp_path):
    image = Pillow.fromarray(pixels())
    path = tmp_path / "a b.png"
    image.save(path)
    url = "data:image/png;base64," + base64.b64encode(encoded(image)).decode()
    for data in (
        path,
        str(path),
        encoded(image),
        bytearray(encoded(image)),
        url,
        image,
        pixels(),
        torch.tensor(pixels()),
    ):
        assert np.array_equal(opened(data), pixels())


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX", "HSV", "LAB"])
def test_modes_become_what_pillow_makes(mode):
    image = Pillow.fromarray(pixels()).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Pillow.merge("LAB", image.split())
    assert np.array_equal(opened(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("1", "TIFF")])
def test_modes_from_files(mode, form):
    data = encoded(Pillow.fromarray(pixels()).convert(mode), form)
    assert np.array_equal(opened(data), np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_alpha_is_dropped_or_put_on_white(mode):
    rgba = np.dstack([pixels(), np.where(pixels()[..., 0] > 120, 255, 0).astype(np.uint8)])
    image = Pillow.fromarray(rgba)
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    clear = rgba[..., 3] == 0
    white = opened(image, alpha="white")
    assert (white[clear] == 255).all() and not (white[~clear] == 255).all()
    if mode in ("RGBA", "LA"):  # the other two store colours already multiplied by alpha
        assert np.array_equal(opened(image), np.asarray(image.convert("RGBA").convert("RGB")))


def test_transparency_of_palettes_and_of_one_colour():
    palette = Pillow.fromarray(np.dstack([pixels(), pixels()[..., 0]])).quantize(8)
    single = Pillow.fromarray(np.where(pixels() > 100, 200, 10).astype(np.uint8))
    for data in (encoded(palette), encoded(single, transparency=(10, 10, 10))):
        assert np.array_equal(opened(data), np.asarray(Pillow.open(io.BytesIO(data)).convert("RGBA").convert("RGB")))
        assert not np.array_equal(opened(data, alpha="white"), opened(data))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form):
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    grey = opened(encoded(Pillow.fromarray(values), form))
    assert np.array_equal(grey, np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, -1))
    assert grey.min() == 0 and grey.max() == 255 and len(np.unique(grey)) == 256


def test_thirty_two_bits_need_a_range():
    assert opened(Pillow.fromarray(np.array([[0, 257, 65535]], np.int32)))[0, :, 0].tolist() == [0, 1, 255]
    for values in (np.array([[0, 70000]], np.int32), np.array([[-1, 5]], np.int32), np.array([[0.0, 1.0]], np.float32)):
        with pytest.raises(DataError, match=r"row-17.*values from.*8 bits"):
            open_picture(Pillow.fromarray(values), PLACE)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Pillow.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert Pillow.open(io.BytesIO(data)).n_frames == 3
    red = opened(data)[5, 10]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


# What a camera stores for each orientation, so that the upright picture is the same.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_gives_the_upright_tensor(form, orientation):
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=16))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    if form == "JPEG":
        blocks = np.kron(pixels(5, 3), np.ones((16, 16, 1))).astype(np.uint8)  # whole blocks of colour survive JPEG
        upright, options, tolerance = blocks, {"quality": 100, "subsampling": 0}, 6
    else:
        upright, tolerance = pixels(), 0
    stored = Pillow.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, form, exif=exif, **options)
    assert np.abs(opened(data).astype(int) - upright).max() <= tolerance
    item = front_end(Image(data), PLACE)
    assert item.layout.original == upright.shape[:2]
    assert front_end.layout(Image(data), PLACE) == item.layout
    if not tolerance:
        assert torch.equal(item.inputs, front_end(Image(upright), PLACE).inputs)


def test_damaged_exif_leaves_the_pixels_as_stored():
    data = encoded(Pillow.fromarray(pixels()), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffbroken")
    assert np.array_equal(opened(data), pixels())


def test_a_given_picture_is_not_changed():
    image = Pillow.open(io.BytesIO(encoded(Pillow.fromarray(pixels()).quantize(8), transparency=0)))
    before = (image.mode, dict(image.info))
    open_picture(image, PLACE)
    assert (image.mode, dict(image.info)) == before


def test_draft_is_off_unless_asked_for():
    data = encoded(Pillow.fromarray(np.kron(pixels(), np.ones((16, 16, 1))).astype(np.uint8)), "JPEG")
    full = ImageFrontEnd(ImageFrontEnd.Config(size=32))
    fast = ImageFrontEnd(ImageFrontEnd.Config(size=32, draft=True))
    assert full(Image(data), PLACE).layout.original == (480, 640)
    item = fast(Image(data), PLACE)
    assert 32 <= min(item.layout.original) < 480
    assert fast.layout(Image(data), PLACE) == item.layout
    torch.testing.assert_close(item.inputs, full(Image(data), PLACE).inputs, atol=0.2, rtol=0)


# ------------------------------------------------------------------------------------------------- what cannot


def bad(tmp_path: Path) -> dict[str, tuple[object, str]]:
    jpeg = encoded(Pillow.fromarray(pixels(200, 200)), "JPEG")
    scan = encoded(Pillow.fromarray(pixels(200, 200)))
    files = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "truncated.png": (scan[: len(scan) // 2], "truncated or damaged"),
        "header-only.jpg": (jpeg[:20], "not a picture"),
        "empty.png": (b"", "0 bytes"),
        "text.png": (b"this is no picture", "not a picture"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "large.png": (png(20000, 20000), r"400,?000,?000.*178,?956,?970|178,956,970.*400000000"),
        "wide.png": (png(2**31 - 1, 1), "178,956,970"),
    }
    cases: dict[str, tuple[object, str]] = {}
    for name, (data, message) in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        cases[name] = (str(path), f"(?s){name}.*({message})")
        if data:
            cases[f"bytes of {name}"] = (data, message)
    os.mkfifo(tmp_path / "pipe.png")
    return cases | {
        "missing": (str(tmp_path / "nothing.png"), "nothing.png.*does not exist"),
        "directory": (str(tmp_path), "directory"),
        "pipe": (tmp_path / "pipe.png", "not a regular file"),
        "address": ("https://example.org/cat.jpg", "example.org.*network"),
        "data url": ("data:image/png;base64,@@@@", "data URL"),
        "data url without a comma": ("data:image/png;base64", "data URL"),
        "nul": ("a\0b", "cannot be read"),
        "long": ("x" * 5000, "cannot be read"),
        "floats": (np.zeros((4, 4, 3), np.float32), r"\[4, 4, 3\].*float32.*uint8"),
        "channels first": (np.zeros((3, 4, 5), np.uint8), r"\[3, 4, 5\].*height, width, 3"),
        "no pixels": (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        "empty bytes": (b"", "0 bytes"),
        "number": (7, "int"),
        "none": (None, "NoneType"),
    }


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_opened_or_refused(form):
    """Whatever a decoder does at broken bytes, one sees a picture or a DataError; both paths agree on the size."""
    random, front_end = np.random.default_rng(0), ImageFrontEnd(ImageFrontEnd.Config(size=8))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    whole = encoded(Pillow.fromarray(pixels()), form, **({} if form in ("GIF", "BMP") else {"exif": exif}))
    seen = set()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            data[random.integers(0, len(data))] = random.integers(0, 256)
        data = data[: random.integers(len(data) // 2, len(data) * 2)]
        try:
            item = front_end(Image(bytes(data)), PLACE)
            assert front_end.layout(Image(bytes(data)), PLACE) == item.layout
            seen.add("opened")
        except DataError:
            seen.add("refused")
    assert seen == {"opened", "refused"} or form in ("PNG", "WEBP")


def test_a_front_end_can_be_sent_to_a_worker():
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=16, fit="pad"))
    other = pickle.loads(pickle.dumps(front_end))
    assert torch.equal(front_end(Image(pixels()), PLACE).inputs, other(Image(pixels()), PLACE).inputs)


with tempfile.TemporaryDirectory() as elsewhere:  # every worker collects: a folder left behind would be one a worker
    NAMES = sorted(bad(Path(elsewhere)))


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_clear_error(tmp_path, name):
    data, message = bad(tmp_path)[name]
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=message) as caught:
            front_end(Image(data), PLACE)
    text = str(caught.value)
    assert text.startswith("sample 'row-17', medium 2 of 3: ")
    assert "\n" not in text and len(text) < 700


def test_the_cap_can_be_lowered_and_is_checked_in_the_header(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(1000, 1000))  # no pixels follow: decoding would fail
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=16, max_pixels=999_999))
    for call in (front_end, front_end.layout):
        with pytest.raises(DataError, match=r"1000x1000 = 1,000,000 pixels, above the limit of 999,999"):
            call(Image(path), PLACE)
    with pytest.raises(DataError, match="1,200"):
        ImageFrontEnd(ImageFrontEnd.Config(size=16, max_pixels=100))(Image(pixels()), PLACE)


def test_a_huge_picture_costs_no_memory(monkeypatch):
    """A small file that would decode to 400 megapixels is refused from the header: nothing is decoded."""

    def decode(self):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(b"\0" * 2_500_001) for _ in range(200)) + packer.flush()
    data = png(20000, 20000, body, kind=0)
    assert len(data) < 1_000_000
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with pytest.raises(DataError, match="above the limit"):
        open_picture(data, PLACE)
    with pytest.raises(DataError, match="above the limit"):
        picture_size(data, PLACE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 20_000_000


@pytest.mark.parametrize(("fit", "size"), [("crop", (1, 60000)), ("pad", (60000, 1)), ("pad", (1, 60000))])
def test_long_strips_stay_small(fit, size):
    """Resized by its shorter side, a strip of 1x60000 would be 20 gigapixels: only what stays is computed."""
    width, height = size
    front_end = ImageFrontEnd(ImageFrontEnd.Config(size=336, fit=fit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    item = front_end(Image(np.full((height, width, 3), 200, np.uint8)), PLACE)
    assert item.inputs.shape == (1, 3, 336, 336) and item.layout.original == (height, width)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200_000_000


def test_the_strip_path_equals_the_plain_one():
    """Where both are possible, the part that stays is the same to one step of 255 after resampling."""
    strip = np.kron(pixels(40, 30), np.ones((20, 1, 1))).astype(np.uint8)  # 40x600
    plain = ImageFrontEnd(ImageFrontEnd.Config(size=56))
    capped = ImageFrontEnd(ImageFrontEnd.Config(size=56, max_pixels=40 * 600))
    assert 56 * int(56 * 600 / 40) > 40 * 600
    a, b = (np.asarray(f.units(Pillow.fromarray(strip), PLACE)[0]).astype(int) for f in (plain, capped))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest_edge": 10, "size": 16}, "shortest_edge 10 is below size 16"),
        ({"size": 16, "tiling": {"pinpoints": [[16, 24]]}}, "16x24.*16x16"),
        ({"size": 16, "tiling": {"pinpoints": []}}, "pinpoints is empty"),
        ({"fit": "squish"}, "fit"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"max_pixels": 10**12}, "max_pixels"),
        ({"crop": 3}, "unknown key 'crop'"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageFrontEnd.Config.parse(options)
