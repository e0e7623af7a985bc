"""Sounds for encoders: pieces of a recording, each as a picture of its energy by pitch and time (log-mel).

Papers: AST (arXiv:2104.01778), ImageBind (arXiv:2305.05665). Reference: facebookresearch/ImageBind 53680b0 ``data.py``,
which cuts as pytorchvideo's ``ConstantClipsPerVideoSampler`` and measures as Kaldi's filter bank does; the bank is that
of transformers' ``ASTFeatureExtractor`` (5.23) within 1e-4.

    recording → samples at ``rate`` → ``clips`` pieces of ``seconds``, the first at the start, the last at the end
    piece     → windows of 25 ms every 10 ms → energy in ``bins`` bands between 20 Hz and half the rate → log

Differences by design: values are rounded to multiples of 2⁻¹⁴, so that every machine makes the same ones and a model's
fingerprint can hold them; a recording shorter than a piece is one piece of which the rest is empty, as there, ``clips``
times over; what cannot be decoded is an error, where the reference goes on without sound.

Letters: ``n`` samples, ``F`` bands, ``L`` windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from chiasm.errors import DataError
from chiasm.processing.base import FrontEnd, FrontEndConfig, Place
from chiasm.processing.open import data_url, open_file, reason
from chiasm.registry import register
from chiasm.types import Audio, Layout, Media, MediaItem

# Self-contained formats only: a playlist could make the decoder open other files and addresses.
_FORMATS = "wav,flac,mp3,ogg,aac,aiff,au,w64,caf,amr,asf,flv,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
WINDOW, HOP = 0.025, 0.010  # seconds
LOWEST = 20.0  # Hz, where the first band begins
FLOOR = 1.1920928955078125e-07  # the least energy that a logarithm is taken of: float32's epsilon
EMPHASIS = 0.97
GRID = 2.0**14
SMOOTHEST = 1 << 24  # numbers in the largest kernel of a resampling: beyond, the rates have no useful common divisor


@register("front_end", "audio")
class AudioFrontEnd(FrontEnd):
    """A path, encoded bytes, or samples with their rate → units ``[clips, 1, bins, frames]``."""

    kind = "audio"
    config: Config

    class Config(FrontEndConfig):
        """``frames``: windows of a piece; those that a piece has not are 0 before ``mean`` and ``std`` are applied.

        ``channels``: a recording of several is the mean of them, or the first alone (ImageBind). ``max_seconds``: a
        longer recording is refused.
        """

        type: str = "audio"
        placeholder: str | None = "<audio>"
        rate: PositiveInt = 16000
        clips: PositiveInt = 3
        seconds: PositiveFloat = 2.0
        bins: PositiveInt = 128
        frames: PositiveInt = 204
        mean: float = -4.268
        std: PositiveFloat = 9.138
        channels: Literal["mean", "first"] = "mean"
        max_seconds: PositiveFloat = Field(default=1200.0)

        @property
        def unit_shape(self) -> tuple[int, ...]:
            """That of one piece."""
            return (1, self.bins, self.frames)

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A sound → ``inputs [clips, 1, bins, frames]``. Raises DataError."""
        samples, rate = self.open(medium, place)
        samples = resampled(samples, rate, self.config.rate, str(place))  # [n]
        pieces = [self._unit(samples[a:b]) for a, b in self.spans(len(samples))]
        return MediaItem(self.kind, torch.stack(pieces), self.layout(medium, place))  # [clips, 1, bins, frames]

    def layout(self, medium: Media, place: Place) -> Layout:
        """The layout that ``self(medium, place)`` gives: always the same."""
        return Layout(self.config.clips, self.config.unit_shape)

    def probe(self) -> Audio:
        """A sound for fingerprints: three seconds of a rising tone."""
        t = np.arange(3 * 8000) / 8000
        return Audio(0.5 * np.sin(2 * np.pi * (200 + 300 * t) * t), rate=8000)

    def open(self, medium: Media, place: Place) -> tuple[Tensor, int]:
        """One channel of samples ``[n]`` between -1 and 1, float64, and their rate. Raises DataError."""
        data = medium.data
        if isinstance(data, str) and data.startswith("data:"):
            data = data_url(data, place)
        if isinstance(data, (str, Path, bytes, bytearray)):
            channels, rate, name = self._decoded(data, place)
        else:
            channels, rate, name = _given(medium, place)
        if channels.shape[1] == 0:
            raise DataError(f"{place}: sound {name} holds 0 samples; restore the file or leave the sample out")
        self._short(channels.shape[1] / rate, name, place)
        if not np.isfinite(channels).all():
            raise DataError(f"{place}: sound {name} holds values that are no numbers; restore it or leave it out")
        one = channels[0] if self.config.channels == "first" else channels.mean(axis=0)
        return torch.from_numpy(np.ascontiguousarray(one, dtype=np.float64)), rate

    def spans(self, samples: int) -> list[tuple[int, int]]:
        """Where each piece begins and ends, in samples at ``rate``: evenly from the first to the last that fits."""
        config, length = self.config, samples / self.config.rate
        room = max(length - config.seconds, 0.0)
        starts = [room * i / max(config.clips - 1, 1) for i in range(config.clips)]
        return [(int(s * config.rate), min(samples, int((s + config.seconds) * config.rate))) for s in starts]

    def _unit(self, samples: Tensor) -> Tensor:
        """One piece ``[n]`` → ``[1, bins, frames]``."""
        config = self.config
        bank = filter_bank(samples - samples.mean(), config.rate, config.bins).T  # [bins, L]
        bank = F.pad(bank[:, : config.frames], (0, max(0, config.frames - bank.shape[1])))  # [bins, frames]
        scaled = (bank - config.mean) / config.std
        return ((scaled * GRID).round() / GRID).float().unsqueeze(0)  # [1, bins, frames]

    def _decoded(self, data: Any, place: Place) -> tuple[np.ndarray, int, str]:
        """Samples ``[channels, n]``, their rate, and what to call the sound."""
        with _container(data, place) as (container, name):
            what = f"{place}: sound {name}"
            if not container.streams.audio:
                raise DataError(f"{what} has no sound in it, only pictures or data; leave the sample out")
            found, seconds, rate = [], 0.0, 0
            try:
                for frame in _frames(container):
                    found.append(frame.to_ndarray())  # [channels, n]
                    rate = frame.sample_rate
                    seconds += frame.samples / rate
                    self._short(seconds, name, place)
            except DataError:
                raise
            except Exception as error:  # a decoder may raise anything at broken data
                raise DataError(
                    f"{what} cannot be decoded after {seconds:.2f} s ({reason(error)}); encode it anew"
                ) from None
        if not found:
            raise DataError(f"{what} holds 0 samples that can be decoded; restore the file or leave the sample out")
        return np.concatenate(found, axis=1), rate, name

    def _short(self, seconds: float, name: str, place: Place) -> None:
        if seconds > self.config.max_seconds:
            raise DataError(
                f"{place}: sound {name} is longer than the limit of {self.config.max_seconds:g} s; cut it, or raise "
                "max_seconds of the front end"
            )


# ----------------------------------------------------------------------------------------------------------- arithmetic


def resampled(samples: Tensor, rate: int, wanted: int, where: str = "") -> Tensor:
    """``samples [n]`` at ``rate`` → ``[⌈n · wanted / rate⌉]`` at ``wanted`` Hz, without what lies above its half.

    A sinc cut at 0.99 of the lower half rate, under a Hann window of six of its zeros a side: as ``torchaudio`` does
    by default. Raises DataError for rates without a common divisor that is worth the name.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    old, new = rate // divisor, wanted // divisor
    cut = 0.99 * min(old, new)
    reach = math.ceil(6 * old / cut)  # samples that the window covers on either side
    if new * (2 * reach + old) > SMOOTHEST:
        raise DataError(f"{where}: a sound of {rate} Hz cannot be brought to {wanted} Hz here; resample it first")
    offsets = torch.arange(-reach, reach + old, dtype=torch.float64) / old  # [k], in units of ``old`` samples
    phases = torch.arange(new, dtype=torch.float64) / new  # [new]
    zeros = ((offsets - phases.unsqueeze(1)) * cut).clamp(-6, 6)  # [new, k], counted in zeros of the sinc
    kernel = torch.sinc(zeros) * torch.cos(zeros * math.pi / 12) ** 2 * cut / old  # [new, k]
    padded = F.pad(samples.double().view(1, 1, -1), (reach, reach + old))
    found = F.conv1d(padded, kernel.unsqueeze(1), stride=old)[0].T.reshape(-1)
    return found[: -(-len(samples) * new // old)]


def filter_bank(samples: Tensor, rate: int, bins: int) -> Tensor:
    """``samples [n]`` → the logarithm of the energy in each band of each window, ``[L, bins]``, float64.

    Kaldi's: each window of 25 ms loses its mean, is emphasised (``x_t - 0.97 x_{t-1}``), weighed with a Hann window
    and filled up to a power of two. Fewer samples than one window give ``L = 0``.
    """
    size, hop = int(rate * WINDOW), int(rate * HOP)
    if len(samples) < size:
        return samples.new_zeros(0, bins, dtype=torch.float64)
    frames = samples.double().unfold(0, size, hop)  # [L, size]
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)  # [L, size]; the first stands before itself
    frames = (frames - EMPHASIS * before) * torch.hann_window(size, periodic=False, dtype=torch.float64)
    wide = 1 << (size - 1).bit_length()
    energy = torch.fft.rfft(frames, wide).abs().square()  # [L, wide/2 + 1]
    return (energy @ bands(rate, wide, bins)).clamp(min=FLOOR).log()  # [L, bins]


@lru_cache(maxsize=8)
def bands(rate: int, size: int, bins: int) -> Tensor:
    """Triangles on the mel scale, ``[size/2 + 1, bins]``, from 20 Hz to half the rate; its own frequency is in none."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    edges = mel(torch.tensor([LOWEST, rate / 2], dtype=torch.float64))
    corners = torch.linspace(float(edges[0]), float(edges[1]), bins + 2, dtype=torch.float64)
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]  # [bins]
    at = mel(torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size).unsqueeze(1)  # [size/2 + 1, 1]
    rising, falling = (at - left) / (middle - left), (right - at) / (right - middle)
    weights = torch.minimum(rising, falling).clamp(min=0.0)  # [size/2 + 1, bins]
    weights[-1] = 0.0
    return weights


# -------------------------------------------------------------------------------------------------------------- opening


def _given(medium: Media, place: Place) -> tuple[np.ndarray, int, str]:
    """Samples that are handed over: ``[n]`` or ``[channels, n]``, whole numbers or floats."""
    data, rate = medium.data, getattr(medium, "rate", None)
    if not isinstance(data, (Sequence, np.ndarray, Tensor)):
        raise DataError(
            f"{place}: a sound cannot be made from {type(data).__name__}; give a path, bytes, or samples and their rate"
        )
    if not rate or rate <= 0:
        raise DataError(f"{place}: the samples of a sound need their rate in Hz; give the audio its rate")
    try:
        array = np.asarray(data)
        values = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: the samples of a sound are no numbers ({reason(error)})") from None
    if array.dtype.kind in "iu" and not isinstance(data, (list, tuple)):
        values = values / (np.iinfo(array.dtype).max + 1)  # of int16: -1 to 1
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise DataError(f"{place}: a sound is samples [n] or [channels, n], got shape {list(values.shape)}")
    return values, int(rate), f"({values.shape[1]} samples)"


@contextmanager
def _container(data: Any, place: Place) -> Iterator[tuple[Any, str]]:
    """The opened sound and what to call it. Only its own bytes can be read: no other file, no network."""
    try:
        import av
    except ImportError:
        raise DataError(f"{place}: decoding a sound needs PyAV; pip install 'chiasm[video]', or give samples") from None
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}

    def opened(stream: Any, name: str) -> Any:
        try:
            return av.open(stream, options=options)
        except Exception as error:  # a header parser may raise anything at broken data
            raise DataError(
                f"{place}: sound {name} is not a sound that can be opened ({reason(error)}); convert it to wav or flac"
            ) from None

    if isinstance(data, (str, Path)):
        with open_file(data, place, "sound") as stream, opened(stream, repr(str(data))) as container:
            yield container, repr(str(data))
    else:
        name = f"({len(data)} bytes)"
        with opened(BytesIO(data), name) as container:
            yield container, name


def _frames(container: Any) -> Iterator[Any]:
    """Frames of the first stream of sound, as float32 ``[channels, n]``, at their own rate."""
    import av

    stream = container.streams.audio[0]
    as_floats = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
    for frame in container.decode(stream):
        yield from as_floats.resample(frame)
    yield from as_floats.resample(None)
