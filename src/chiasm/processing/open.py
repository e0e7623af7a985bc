"""Opening pictures: whatever a message may hold becomes an upright RGB picture, or one clear error.

What each kind of picture becomes, in this order:

* The size is read from the header first; a picture above the pixel cap is refused before any pixel is decoded.
* The EXIF orientation is applied, so that the tensor equals that of the upright picture.
* 16-bit grey is scaled to 8 bit (``round(v / 257)``). Pillow's own conversion clips it to white.
* Palettes, grey, 1-bit, CMYK and YCbCr become RGB as Pillow's ``convert("RGB")`` makes it.
* Transparency: ``alpha="drop"`` keeps the colours and forgets the alpha, as ``convert("RGB")`` does, which is what
  LLaVA and ``transformers.image_utils.load_image`` do; ``alpha="white"`` puts the picture on white, as the image
  processors of transformers 5 do when they are handed a picture with an alpha channel.
* Of an animation, the first frame.
"""

from __future__ import annotations

import base64
import binascii
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from chiasm.errors import DataError
from chiasm.processing.base import Place

Alpha = Literal["drop", "white"]

PILLOW_LIMIT = 178_956_970
"""Pixels above which Pillow itself refuses a picture; also the default cap."""

# Only formats whose decoder is a library in this process (EPS, for one, would start another program), and that begin
# with a signature (TGA does not: any bytes may pass for one).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "ICO")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}


def open_picture(
    data: Any, place: Place, max_pixels: int = PILLOW_LIMIT, alpha: Alpha = "drop", draft: int | None = None
) -> Pillow.Image:
    """``data`` as an upright RGB picture.

    ``data`` is a path, encoded bytes, a data URL, a PIL image, or an array ``[height, width]`` or
    ``[height, width, 1|3|4]`` of uint8. ``draft`` lets the JPEG decoder halve the picture while both sides stay at or
    above that many pixels: faster, but other pixels. Raises DataError, beginning with ``str(place)``.
    """
    with _opened(data, place, max_pixels) as (image, name):
        if draft is not None:
            image.draft("RGB", (draft, draft))
        try:
            image.load()
        except Exception as error:  # a decoder may raise anything at broken data
            raise DataError(
                f"{place}: picture {name} cannot be decoded ({reason(error)}); it is truncated or damaged: "
                "restore the file or leave the sample out",
                "broken_picture",
            ) from None
        try:
            return _rgb(_upright(image), alpha, f"{place}: picture {name}")
        except ValueError as error:
            raise DataError(
                f"{place}: picture {name} of mode {image.mode} cannot become RGB ({reason(error)}); "
                "convert the file to RGB",
                "broken_picture",
            ) from None


def picture_size(data: Any, place: Place, max_pixels: int = PILLOW_LIMIT) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone: no pixel is decoded. Raises DataError."""
    with _opened(data, place, max_pixels) as (image, _):
        width, height = image.size
        # Pillow reports the size of a TIFF already turned upright.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(data: Any, place: Place, max_pixels: int) -> Iterator[tuple[Pillow.Image, str]]:
    """The picture with its header read and its size checked, and what to call it in an error."""
    if isinstance(data, Pillow.Image):
        yield _checked(data, f"(a PIL image of mode {data.mode})", place, max_pixels)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        yield _from_bytes(bytes(data), f"({len(data)} bytes)", place, max_pixels)
    elif isinstance(data, str) and data[:5].lower() == "data:":
        yield _from_bytes(data_url(data, place), f"({_short(data, 40)})", place, max_pixels)
    elif isinstance(data, (str, Path)):
        name = repr(_short(str(data)))
        with open_file(data, place, "picture") as stream:
            yield _checked(_header(stream, name, place, max_pixels), name, place, max_pixels)
    elif hasattr(data, "__array__"):
        yield _from_array(np.asarray(data), place, max_pixels)
    else:
        raise DataError(
            f"{place}: a picture cannot be made from {type(data).__name__}; give a path, bytes, a data URL, a PIL "
            "image or an array [height, width, 3] of uint8"
        )


@contextmanager
def open_file(path: str | Path, place: Place, noun: str) -> Iterator[BinaryIO]:
    """A regular file that is not empty, open for reading; ``noun`` ("picture") is for the error. Raises DataError."""
    what = f"{place}: {noun} {_short(str(path))!r}"
    if isinstance(path, str) and "://" in path[:16]:
        told = f"{what} is an address, and nothing is fetched from the network; download it and give the path"
        raise DataError(told, "missing_picture")
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{what} is a directory; give the path of one file", "picture_is_folder")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{what} is not a regular file; give the path of one file", "broken_picture")
        if status.st_size == 0:
            raise DataError(f"{what} has 0 bytes; restore the file or leave the sample out", "empty_picture")
        stream = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        told = f"{what} does not exist; check the path and the folder it should be in"
        if "\\udc" in str(path):
            told = f"{what}: its name holds bytes that are no UTF-8; rename the file"
        raise DataError(told, "missing_picture") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be read ({reason(error)}); check the path", "missing_picture") from None
    with stream:
        yield stream


def _from_bytes(data: bytes, name: str, place: Place, max_pixels: int) -> tuple[Pillow.Image, str]:
    if not data:
        raise DataError(f"{place}: picture has 0 bytes; restore it or leave the sample out", "empty_picture")
    return _checked(_header(BytesIO(data), name, place, max_pixels), name, place, max_pixels)


def _from_array(array: np.ndarray, place: Place, max_pixels: int) -> tuple[Pillow.Image, str]:
    shape = list(array.shape)
    grey = array.ndim == 2 or (array.ndim == 3 and shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and shape[2] in (3, 4))):
        raise DataError(
            f"{place}: picture is an array {shape} of {array.dtype}; expected [height, width, 3] of uint8 (0 to 255), "
            "so move the channels last and scale the values"
        )
    name = f"(an array {shape})"
    if 0 in shape:
        raise DataError(f"{place}: picture {name} has no pixels; leave the sample out")
    pixels = array.reshape(shape[0], shape[1]) if grey else array
    return _checked(Pillow.fromarray(np.ascontiguousarray(pixels)), name, place, max_pixels)


def _header(stream: Any, name: str, place: Place, max_pixels: int) -> Pillow.Image:
    try:
        with warnings.catch_warnings():
            # Our own cap decides below; Pillow's warning at half of its limit would be a second, vaguer voice.
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)
            return Pillow.open(stream, formats=_formats())
    except Pillow.DecompressionBombError as error:
        limit = min(max_pixels, PILLOW_LIMIT)
        raise DataError(
            f"{place}: picture {name} is above the limit of {limit:,} pixels ({reason(error)}); "
            "shrink the picture or leave the sample out",
            "oversized_picture",
        ) from None
    except Exception as error:  # a header parser may raise anything at broken data
        raise DataError(
            f"{place}: picture {name} is not a picture that can be opened ({reason(error)}); formats: "
            f"{', '.join(_formats())}. Convert the file or leave the sample out",
            "broken_picture",
        ) from None


def _checked(image: Pillow.Image, name: str, place: Place, max_pixels: int) -> tuple[Pillow.Image, str]:
    width, height = image.size
    if width < 1 or height < 1:
        told = f"{place}: picture {name} is {width}x{height} pixels, so it has none; leave the sample out"
        raise DataError(told, "broken_picture")
    if width * height > max_pixels:
        raise DataError(
            f"{place}: picture {name} is {width}x{height} = {width * height:,} pixels, above the limit of "
            f"{max_pixels:,}; shrink the picture, leave the sample out, or raise max_pixels (at most {PILLOW_LIMIT:,})",
            "oversized_picture",
        )
    return image, name


def data_url(url: str, place: Place) -> bytes:
    """The bytes that a data URL holds. Raises DataError."""
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma after the head")
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(body.split()), validate=True)
        return unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise DataError(
            f"{place}: data URL {_short(url, 40)!r} cannot be read ({reason(error)}); "
            "expected data:image/png;base64,...",
            "broken_picture",
        ) from None


def _orientation(image: Pillow.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none, or none that can be read."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # asking a PNG further would decode it, to look for EXIF after the pixels
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the direction; the pixels stand as they are stored
        return 1
    return value if value in _UPRIGHT else 1


def _upright(image: Pillow.Image) -> Pillow.Image:
    if image.format == "TIFF":
        return image  # Pillow turns a TIFF while it loads
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _rgb(image: Pillow.Image, alpha: Alpha, what: str) -> Pillow.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image, what).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # colours stored multiplied by alpha
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and alpha == "white":
        rgba = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, rgba).convert("RGB")
    if transparent and image.mode == "P":
        image = image.convert("RGBA")  # same colours as straight to RGB, without Pillow's warning about the palette
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Pillow.Image, what: str) -> Pillow.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise DataError(
            f"{what} holds values from {low} to {high} in mode {image.mode}, which has no agreed range; "
            "scale it to 0..255 and save it with 8 bits"
        )
    return Pillow.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # round(v / 257)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Pillow.init()
    return tuple(name for name in _FORMATS if name in Pillow.OPEN)


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line of at most 160 characters."""
    if isinstance(error, UnidentifiedImageError):  # its text holds the address of a buffer
        return "its first bytes belong to none of the formats"
    text = " ".join(str(error).split()) or type(error).__name__
    return _short(text, 160)


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
