"""Clips: which frames are taken, that they are those frames, and what cannot be opened."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from chiasm.errors import ConfigError, DataError
from chiasm.processing.base import Place
from chiasm.processing.image import ImageFrontEnd
from chiasm.processing.video import VideoFrontEnd, _picture, time_instruction, uniform
from chiasm.types import Image, Video

av = pytest.importorskip("av")
PLACE = Place("clip-3", 0, 1)


def front_end(**options) -> VideoFrontEnd:
    return VideoFrontEnd(VideoFrontEnd.Config.parse({"image": {"size": 32, "fit": "squash"}, **options}))


def frames(count: int) -> list[np.ndarray]:
    """Frames that say their number in eight bars, bright for a 1: no codec blurs that."""
    return [
        np.kron(np.array([bits(i)] * 48), np.ones(8)).astype(np.uint8)[:, :, None].repeat(3, 2) for i in range(count)
    ]


def bits(number: int) -> list[int]:
    return [40 + 160 * (number >> b & 1) for b in range(8)]


def film(count: int = 30, form: str = "mp4", rate: int = 10) -> bytes:
    """A clip of ``frames(count)``; an mp4 has its index in front, so that it opens even where it is cut short."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        options = {"movflags": "faststart"} if form == "mp4" else {}
        with av.open(str(path), "w", format=form, options=options) as container:
            track = container.add_stream("mpeg4", rate=rate)
            track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
            for picture in frames(count):
                container.mux(track.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(track.encode())
        return path.read_bytes()


def numbers(inputs: torch.Tensor) -> list[int]:
    """The frame numbers back from ``[U, 3, 32, 32]``."""
    bars = inputs.mean((1, 2)).view(-1, 8, 4)[:, :, 1:3].mean(-1) > 0
    return [sum(int(bit) << b for b, bit in enumerate(row)) for row in bars]


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 8}, [0, 4, 8, 12, 16, 20, 24, 29]),
        ({"frames": 1}, [0]),
        ({"frames": 32, "sampling": "fps", "fps": 2.0}, [0, 5, 10, 15, 20, 25]),
        ({"frames": 4, "sampling": "fps", "fps": 2.0}, [0, 9, 19, 29]),
        ({"frames": 32, "sampling": "fps", "fps": 100.0}, list(range(30))),
        ({"frames": 30, "sampling": "all"}, list(range(30))),
    ],
)
def test_the_frames_are_those_chosen(tmp_path, form, options, expected):
    path = tmp_path / "clip"
    path.write_bytes(film(form=form))
    item = front_end(**options)(Video(str(path)), PLACE)
    assert numbers(item.inputs) == expected
    assert item.inputs.shape == (len(expected), 3, 32, 32) and item.inputs.is_contiguous()
    assert item.layout.units == len(expected) and item.layout.original == (48, 64) and item.kind == "video"
    assert front_end(**options).layout(Video(str(path)), PLACE) == item.layout
    assert torch.equal(front_end(**options)(Video(path.read_bytes()), PLACE).inputs, item.inputs)


def test_a_short_clip_repeats_frames():
    assert numbers(front_end(frames=8)(Video(film(3)), PLACE).inputs) == list(uniform(3, 8)) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_a_sequence_of_pictures():
    item = front_end(frames=5)(Video(frames(9)), PLACE)
    assert numbers(item.inputs) == [0, 2, 4, 6, 8]
    assert front_end(frames=5).layout(Video(frames(9)), PLACE) == item.layout
    for data in (tuple(map(Pillow.fromarray, frames(9))), np.stack(frames(9))):
        assert torch.equal(front_end(frames=5)(Video(data), PLACE).inputs, item.inputs)
    timed = front_end(frames=5, sampling="fps", fps=1.0)(Video(frames(9), fps=4.0), PLACE)
    assert numbers(timed.inputs) == [0, 4, 8]
    single = ImageFrontEnd(ImageFrontEnd.Config(size=32, fit="squash"))(Image(frames(9)[4]), PLACE)
    assert torch.equal(timed.inputs[1:2], single.inputs)


def test_time_sentence():
    clip = front_end(frames=3).clip(Video(film(30)), PLACE)
    assert time_instruction(clip) == (
        "The video lasts for 3.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,1.40s,2.90s.Please answer the following questions related to this video."
    )


def test_a_playlist_opens_nothing_else(tmp_path):
    """A file may name other files and addresses; the decoder alone would follow them."""
    target = tmp_path / "secret.mp4"
    target.write_bytes(film())
    playlist = tmp_path / "list.mp4"
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{target}'\n",
    ):
        playlist.write_text(text)
        with pytest.raises(DataError, match="not a video that can be opened"):
            front_end()(Video(str(playlist)), PLACE)


def sound() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        track = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing", "nowhere.mp4", "does not exist"),
        ("directory", ".", "directory"),
        ("address", "https://example.org/a.mp4", "network"),
        ("text", b"this is no video", "not a video"),
        ("empty", [], "0 frames"),
        ("mp4 cut short", film(40)[: len(film(40)) * 2 // 3], "truncated: its data end in the middle of frame"),
        ("avi cut short", film(40, "avi")[:-1500], "truncated"),
        ("mkv cut short", film(40, "matroska")[: len(film(40, "matroska")) * 2 // 3], "4.00 s by its header, and"),
        ("only sound", sound(), "no pictures"),
        ("number", 5, "int"),
        ("bad frame", [frames(1)[0], "nowhere.png"], "nowhere.png"),
    ],
)
def test_bad_clips(name, data, message):
    with pytest.raises(DataError, match=message) as caught:
        front_end(frames=4)(Video(data), PLACE)
    assert str(caught.value).startswith("sample 'clip-3'") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (0, -1)), (-90, (-1, 0)), (180, (-1, -1))])
def test_phones_store_the_turn_beside_the_pixels(rotation, corner):
    """``rotation`` is what ffmpeg reports: degrees counterclockwise to show the frame; the mark was stored top left."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[0, 0] = 255
    frame = SimpleNamespace(rotation=rotation, to_image=lambda: Pillow.fromarray(stored))
    shown = np.asarray(_picture(frame))
    assert shown.shape[:2] == ((64, 48) if rotation in (90, -90) else (48, 64))
    column, row = corner
    assert shown[row, column, 0] == 255 and shown.sum() == 3 * 255


def test_limits_and_configurations():
    with pytest.raises(DataError, match="64x48 = 3,072 pixels, above the limit of 3,000"):
        front_end(image={"size": 32, "max_pixels": 3000})(Video(film(3)), PLACE)
    with pytest.raises(DataError, match="no frame rate"):
        front_end(sampling="fps")(Video(frames(3)), PLACE)
    with pytest.raises(ConfigError, match="tiling"):
        front_end(image={"size": 32, "tiling": {"pinpoints": [[32, 64]]}})


@pytest.mark.data
def test_real_clip(shared_data):
    """The frames stored beside the real clip, decoded by another program, are those we get under their numbers."""
    path = shared_data / "video/big_buck_bunny_small.mp4"
    (facts,) = json.loads((shared_data / "video/manifest.json").read_text())
    clip = front_end(frames=8).clip(Video(path), PLACE)
    assert clip.total == facts["frames"] and clip.fps == facts["fps"]
    assert list(clip.original) == facts["size"][::-1]
    every = front_end(frames=200, sampling="all")(Video(path), PLACE).inputs
    stored = sorted((shared_data / "video/big_buck_bunny_small_frames").glob("*.png"), key=lambda p: int(p.stem))
    picture = ImageFrontEnd(ImageFrontEnd.Config(size=32, fit="squash"))
    for number, file in zip(facts["uniform8_indices"], stored, strict=True):
        expected = picture(Image(file), PLACE).inputs[0]
        errors = (every - expected).abs().mean((1, 2, 3))
        assert int(errors.argmin()) == number and errors[number] < 0.02
    eight = front_end(frames=8)(Video(path), PLACE).inputs
    assert torch.equal(eight, every[list(uniform(132, 8))])
