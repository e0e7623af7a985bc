"""Clips for encoders: frames are chosen, decoded, and fitted like pictures.

Papers: LLaVA-NeXT-Video (2024), LLaVA-OneVision (arXiv:2408.03326), LLaVA-Video (arXiv:2410.02713). Reference:
LLaVA-VL/LLaVA-NeXT ``llava/utils.py`` df17966.

Differences by design: the seconds in ``time_instruction`` are always the frame's number over the frame rate (the
reference divides by its stride where it does not resample); a clip that says it has more frames than can be decoded is
an error; no other file or address is opened on behalf of a playlist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as Pillow
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.open import open_file, picture_size, reason
from chiasm.registry import register
from chiasm.types import Layout, Media, MediaItem

# Self-contained formats only: a playlist could make the decoder open other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,gif"


@dataclass(frozen=True)
class Clip:
    """Which frames are taken from a clip: ``indices`` of ``total``, at ``fps`` frames a second (None: not known)."""

    total: int
    fps: float | None
    indices: tuple[int, ...]
    original: tuple[int, int]  # (height, width) of the first frame in pixels


@register("front_end", "video")
class VideoFrontEnd(FrontEnd):
    """A path, encoded bytes or a sequence of pictures → units ``[frames, 3, size, size]``."""

    kind = "video"
    config: Config

    class Config(FrontEndConfig):
        """How frames are chosen.

        ``sampling``: ``"uniform"`` takes exactly ``frames``, evenly from the first to the last (a shorter clip repeats
        some); ``"fps"`` takes ``fps`` frames a second, and where those are more than ``frames`` samples uniformly;
        ``"all"`` takes every frame up to ``frames``, and beyond that samples uniformly.
        """

        type: str = "video"
        placeholder: str | None = "<image>"
        frames: int = Field(default=32, ge=1)
        sampling: Literal["uniform", "fps", "all"] = "uniform"
        fps: float = Field(default=1.0, gt=0)
        image: ImageFrontEnd.Config = ImageFrontEnd.Config()

        @property
        def unit_shape(self) -> tuple[int, ...]:
            """That of a picture: a unit is a frame."""
            return self.image.unit_shape

        def model_post_init(self, context: Any) -> None:
            """Raises ConfigError where frames would be tiled."""
            if self.image.tiling:
                raise ConfigError("video: frames are not cut into tiles; set image.tiling to null")

    def __init__(self, config: Config):
        super().__init__(config)
        self.image = ImageFrontEnd(config.image)

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A clip → ``inputs [frames, 3, size, size]``. Raises DataError."""
        if _is_frames(medium.data):
            clip = self.clip(medium, place)
            units = {i: self._unit(self.image.open(medium.data[i], place), place) for i in set(clip.indices)}
        else:
            with _container(medium.data, place) as (container, name):
                clip = self._clip(_Header.read(container, name, place), place)
            with _container(medium.data, place) as (container, name):
                units = self._decode(container, clip, f"{place}: video {name}", place)
        inputs = torch.stack([units[i] for i in clip.indices])  # [frames, 3, size, size]
        return MediaItem(self.kind, inputs, self._layout(clip))

    def layout(self, medium: Media, place: Place) -> Layout:
        """The layout that ``self(medium, place)`` gives; decodes one frame at most. Raises DataError."""
        return self._layout(self.clip(medium, place))

    def clip(self, medium: Media, place: Place) -> Clip:
        """Which frames ``self(medium, place)`` takes. Raises DataError."""
        if _is_frames(medium.data):
            if not len(medium.data):
                raise DataError(f"{place}: the clip has 0 frames; give at least 1 or leave the sample out")
            first = picture_size(medium.data[0], place, self.config.image.max_pixels)
            return self._clip(_Header(len(medium.data), getattr(medium, "fps", None), first), place)
        with _container(medium.data, place) as (container, name):
            return self._clip(_Header.read(container, name, place), place)

    def _clip(self, header: _Header, place: Place) -> Clip:
        config, total = self.config, header.total
        height, width = header.original
        if height * width > config.image.max_pixels:
            raise DataError(
                f"{place}: the clip's frames are {width}x{height} = {height * width:,} pixels, above the limit of "
                f"{config.image.max_pixels:,}; shrink the clip or raise image.max_pixels"
            )
        step = 1
        if config.sampling == "fps":
            if not header.fps:
                raise DataError(
                    f"{place}: the clip has no frame rate, which sampling 'fps' needs; give the video its fps"
                )
            step = max(1, round(header.fps / config.fps))
        indices = range(0, total, step)
        if config.sampling == "uniform" or len(indices) > config.frames:
            return Clip(total, header.fps, uniform(total, config.frames), header.original)
        return Clip(total, header.fps, tuple(indices), header.original)

    def _decode(self, container: Any, clip: Clip, what: str, place: Place) -> dict[int, Tensor]:
        wanted, units = set(clip.indices), {}
        seen = 0
        try:
            for number, frame in enumerate(_frames(container)):
                seen = number + 1
                if number in wanted:
                    units[number] = self._unit(_picture(frame), place)
                if len(units) == len(wanted):
                    break
        except Exception as error:  # a decoder may raise anything at broken data
            raise DataError(f"{what} cannot be decoded at frame {seen} ({reason(error)}); encode it anew") from None
        if len(units) < len(wanted):
            raise DataError(
                f"{what} holds {clip.total} frames but only {seen} can be decoded; it is truncated or damaged: "
                "restore the file or leave the sample out"
            )
        return units

    def _unit(self, frame: Pillow.Image, place: Place) -> Tensor:
        """One RGB frame → ``[3, size, size]``."""
        return self.image.normalise(self.image.units(frame, Place(place.sample, 0, 1)))[0]

    def _layout(self, clip: Clip) -> Layout:
        size = self.config.image.size
        return Layout(len(clip.indices), (3, size, size), (0, 0), clip.original)


@dataclass(frozen=True)
class _Header:
    """What is known of a clip before its frames are decoded."""

    total: int
    fps: float | None
    original: tuple[int, int]

    @classmethod
    def read(cls, container: Any, name: str, place: Place) -> _Header:
        """Counts the packets (nothing is decoded for that), then decodes the first frame for its size."""
        what = f"{place}: video {name}"
        try:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            total, torn = _count(container, stream)
            container.seek(0)
            first = next(iter(_frames(container)), None)
        except IndexError:
            raise DataError(f"{what} has no pictures in it, only sound or data; leave the sample out") from None
        except Exception as error:  # a decoder may raise anything at broken data
            raise DataError(f"{what} cannot be decoded ({reason(error)}); encode it anew") from None
        if torn:
            raise DataError(f"{what} is truncated: {torn}; restore the file or leave the sample out")
        if first is None or not total:
            raise DataError(f"{what} has 0 frames that can be decoded; restore the file or leave the sample out")
        picture = _picture(first)
        return cls(total, float(rate) if rate else None, (picture.height, picture.width))


def _count(container: Any, stream: Any) -> tuple[int, str]:
    """Frames, without decoding one, and what shows that the file was cut short ("" where nothing does)."""
    total, end, corrupt = 0, 0.0, False
    for packet in container.demux(stream):
        if packet.size:
            total, corrupt = total + 1, corrupt or packet.is_corrupt
            if packet.pts is not None:
                end = max(
                    end, float((packet.pts + (packet.duration or 0) - (stream.start_time or 0)) * packet.time_base)
                )
    if corrupt:
        return total, f"its data end in the middle of frame {total}"
    declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if not declared and container.duration and len(container.streams) == 1:
        declared = container.duration / 1e6  # microseconds
    if declared - end > max(0.1 * declared, 2 * declared / max(total, 1)):
        return total, f"it lasts {declared:.2f} s by its header, and {end:.2f} s can be read"
    return total, ""


def uniform(total: int, count: int) -> tuple[int, ...]:
    """``count`` frame numbers evenly from 0 to ``total - 1``, rounded down, as the reference takes them."""
    return tuple(int(i) for i in np.linspace(0, total - 1, count, dtype=int))


def time_instruction(clip: Clip) -> str:
    """LLaVA-Video's sentence on when each frame was, for the prompt. Raises DataError without a frame rate."""
    if not clip.fps:
        raise DataError("the time of the frames is not known; give the video its fps")
    times = ",".join(f"{i / clip.fps:.2f}s" for i in clip.indices)
    return (
        f"The video lasts for {clip.total / clip.fps:.2f} seconds, and {len(clip.indices)} frames are uniformly "
        f"sampled from it. These frames are located at {times}."
        "Please answer the following questions related to this video."  # no space before it, as the models learned it
    )


def _is_frames(data: Any) -> bool:
    return (isinstance(data, Sequence) and not isinstance(data, (str, bytes, bytearray))) or getattr(
        data, "ndim", 0
    ) == 4


@contextmanager
def _container(data: Any, place: Place) -> Iterator[tuple[Any, str]]:
    """The opened clip and what to call it. Only its own bytes can be read: no playlist, no other file, no network."""
    try:
        import av
    except ImportError:
        raise DataError(f"{place}: decoding a video needs PyAV; pip install 'chiasm[video]', or give frames") from None
    if isinstance(data, (str, Path)):
        with open_file(data, place, "video") as stream, _demuxer(av, stream, repr(str(data)), place) as container:
            yield container, repr(str(data))
    elif isinstance(data, (bytes, bytearray)):
        name = f"({len(data)} bytes)"
        with _demuxer(av, BytesIO(data), name, place) as container:
            yield container, name
    else:
        raise DataError(
            f"{place}: a video cannot be made from {type(data).__name__}; give a path, bytes, or a sequence of pictures"
        )


def _demuxer(av: Any, stream: Any, name: str, place: Place) -> Any:
    try:
        return av.open(stream, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"})
    except Exception as error:  # a header parser may raise anything at broken data
        raise DataError(
            f"{place}: video {name} is not a video that can be opened ({reason(error)}); convert it to mp4 or webm"
        ) from None


def _frames(container: Any) -> Iterator[Any]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return container.decode(stream)


def _picture(frame: Any) -> Pillow.Image:
    """A decoded frame as an upright RGB picture: phones store the turn beside the pixels."""
    image = frame.to_image()
    turn = getattr(frame, "rotation", 0) % 360
    return image.rotate(turn, expand=True) if turn else image
