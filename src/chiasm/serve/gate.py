"""The media gate: whatever a request calls a picture becomes an opened picture, or one clear refusal.

Data URLs always; addresses and paths only where the operator allowed them (``fetch``, ``files``). Nothing is found by
scanning text. The format is told from the first bytes, out of five; the size is read from the header before a pixel is
decoded; and no text of a decoder reaches a client.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import anyio
from PIL import Image as Pillow

from chiasm.serve.errors import ApiError
from chiasm.serve.fetch import Fetcher, Refused
from chiasm.serve.files import read
from chiasm.serve.options import MediaOptions

FORMATS = "PNG, JPEG, WebP, GIF or BMP"
LOW = 512  # pixels of the longer side with "detail": "low"


@dataclass(frozen=True)
class Wanted:
    """A picture as a request names it, and its place in the request."""

    url: str
    param: str
    low: bool = False


class Gate:
    """Opens the pictures of requests. ``rejected`` counts refusals by reason."""

    def __init__(self, options: MediaOptions, fetcher: Fetcher | None = None):
        self.options = options
        self.fetcher = fetcher or Fetcher(options)
        self.rejected: dict[str, int] = {}

    async def bring(self, wanted: Sequence[Wanted]) -> list[bytes]:
        """The files of the pictures, fetched side by side where that is allowed. Raises ApiError (400)."""
        if len(wanted) > self.options.pictures:
            text = f"{len(wanted)} pictures in one request; at most {self.options.pictures} are taken"
            raise self._error("count", text, wanted[self.options.pictures].param)
        found: list[bytes] = [b""] * len(wanted)
        errors: dict[int, ApiError] = {}

        async def one(index: int) -> None:
            try:
                found[index] = await self._bytes(wanted[index])
            except Refused as error:
                errors[index] = self._error("source", str(error), wanted[index].param)

        async with anyio.create_task_group() as group:
            for index in range(len(wanted)):
                group.start_soon(one, index)
        if errors:
            raise errors[min(errors)]
        return found

    async def _bytes(self, wanted: Wanted) -> bytes:
        scheme = wanted.url[:8].lower()
        if scheme.startswith("data:"):
            return await anyio.to_thread.run_sync(from_data_url, wanted.url, self.options.picture_bytes)
        if scheme.startswith(("http:", "https:")):
            return await self.fetcher.fetch(wanted.url)
        if scheme.startswith("file:"):
            return await anyio.to_thread.run_sync(read, wanted.url, self.options)
        return from_base64(wanted.url, self.options.picture_bytes, bare=True)

    def decode(self, wanted: Sequence[Wanted], found: list[bytes]) -> list[Pillow.Image]:
        """The pictures, loaded, first frame of each; ``found`` is emptied. Blocks. Raises ApiError (400)."""
        pictures, pixels = [], 0
        for index, one in enumerate(wanted):
            try:
                picture = decode(found[index], self.options, one.low)
            except Refused as error:
                raise self._error("decode", str(error), one.param) from None
            found[index] = b""
            pixels += picture.width * picture.height
            if pixels > self.options.request_pixels:
                text = f"the pictures of this request have above {self.options.request_pixels} pixels together"
                raise self._error("pixels", text, one.param)
            pictures.append(picture)
        return pictures

    def _error(self, reason: str, text: str, param: str) -> ApiError:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        return ApiError(400, text, param, "invalid_image")


def from_data_url(url: str, most: int) -> bytes:
    """The bytes of ``data:<anything>;base64,...``. What the media type says is not relied on. Raises Refused."""
    head, comma, body = url.partition(",")
    if not comma or len(head) > 256 or not head.lower().endswith(";base64"):
        raise Refused("a data URL of a picture must be data:image/png;base64,...")
    return from_base64(body, most)


def from_base64(text: str, most: int, bare: bool = False) -> bytes:
    """Strict base64, with white space between. ``bare``: it came without ``data:`` and must be a picture at once."""
    other = Refused("a picture must be a data URL: data:image/png;base64,...")
    wrong = other if bare else Refused("the base64 of a picture cannot be read; it is the standard alphabet, padded")
    if len(text) > 2 * most + 1024:
        raise Refused(f"a picture's file is above the limit of {most} bytes")
    try:
        packed = text.encode("ascii").translate(None, b" \t\r\n\f")
        data = base64.b64decode(packed, validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise wrong from None
    if len(data) > most:
        raise Refused(f"a picture's file is {len(data)} bytes, above the limit of {most}")
    if bare and sniff(data) is None:
        raise other
    return data


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes belong to."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM":
        return "BMP"
    return None


def decode(data: bytes, options: MediaOptions, low: bool = False) -> Pillow.Image:
    """A picture's first frame. ``low`` shrinks it to 512 pixels. Raises Refused, with a text of ours."""
    kind = sniff(data)
    if kind is None:
        raise Refused(f"a picture is not {FORMATS}")
    try:
        if kind == "WEBP":  # its decoder reserves the whole canvas when it is opened
            _check(_webp_size(data), options)
        image: Any = Pillow.open(BytesIO(data), formats=(kind,))
        _check(image.size, options)
        if low and kind == "JPEG":
            image.draft("RGB", (LOW, LOW))
        image.load()
        if low:
            image.thumbnail((LOW, LOW))
        return image
    except Refused:
        raise
    except Pillow.DecompressionBombError:
        raise _too_large(options) from None
    except Exception:  # a decoder may raise anything at broken data, and its text may hold anything
        raise Refused("a picture is truncated or damaged") from None


def _check(size: tuple[int, int], options: MediaOptions) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Refused("a picture has no pixels")
    if width * height > options.picture_pixels or max(size) > options.side:
        raise _too_large(options)
    if max(size) > options.aspect * min(size):
        raise Refused(f"a picture is more than {options.aspect:g} times as long as it is wide, or as wide as long")


def _too_large(options: MediaOptions) -> Refused:
    return Refused(f"a picture is above the limit of {options.picture_pixels} pixels, or {options.side} on a side")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height by the header of a WebP file: lossy, lossless or extended."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise Refused("a picture is truncated or damaged")
