"""Tones: the same by their number in any process, splits apart, and what is said of them is so."""

from __future__ import annotations

import numpy as np
import pytest

from chiasm.data.sources.tones import PITCHES, RATE, Tones
from chiasm.errors import DataError


def made(**changes):
    return Tones(Tones.Config(**{"length": 60, **changes}))


def test_what_is_said_is_heard():
    """The strongest frequency of the first and last tenths of a tone is where its description puts it."""
    for i in range(60):
        example = made(ask=False)[i]
        _, pitch, course, _ = example.messages[1].text.split()
        sound = example.messages[0].media[0]
        tenth = len(sound.data) // 10
        ends = []
        for part in (sound.data[tenth : 3 * tenth], sound.data[-3 * tenth : -tenth]):
            power = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 15))
            ends.append(power.argmax() * RATE / (1 << 15))
        low, high = PITCHES[pitch]
        assert low * 0.8 < ends[0] < high * 1.4
        change = ends[1] / ends[0]
        assert {"steady": 0.95 < change < 1.05, "rising": change > 1.2, "falling": change < 0.8}[course], example.id


def test_an_example_is_its_number():
    source, again = made(), made()
    for i in (0, 7, 59):
        assert np.array_equal(source[i].messages[0].media[0].data, again[i].messages[0].media[0].data)
        assert source[i].answers == again[i].answers and source[i].id == again[i].id
    other = made(split="test")
    assert not any(
        np.array_equal(source[i].messages[0].media[0].data, other[i].messages[0].media[0].data) for i in range(9)
    )
    tasks = {source[i].task for i in range(60)}
    assert tasks == {"tone_pitch", "tone_course"} and made(ask=False)[0].task == "tone_caption"
    with pytest.raises(DataError, match="example 60 was asked for, there are 60"):
        source[60]
