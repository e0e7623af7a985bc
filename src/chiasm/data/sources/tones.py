"""Tones with exact descriptions, made on demand: what the playground is to pictures, as small as can be, to sounds."""

from __future__ import annotations

from random import Random
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt

from chiasm.data.base import Example, Source, SourceConfig
from chiasm.errors import DataError
from chiasm.registry import register
from chiasm.types import Audio, Message, Text

RATE = 16000  # Hz
SECONDS = (0.3, 1.0)  # the shortest and the longest
PITCHES = {"low": (200.0, 350.0), "high": (1200.0, 2000.0)}  # Hz, where a tone begins
COURSES = {"steady": 1.0, "rising": 1.8, "falling": 1 / 1.8}  # how often that its end is
NOISE = 0.01
QUESTIONS = {"pitch": "Is the tone low or high?", "course": "Is the tone steady, rising or falling?"}


class TonesConfig(SourceConfig):
    """``ask``: a question about each tone; else a description of it. Splits share no tone."""

    type: str = "tones"
    split: Literal["train", "validation", "test"] = "train"
    length: NonNegativeInt = 1000
    ask: bool = True
    seed: int = 0


@register("source", "tones")
class Tones(Source):
    """A tone of some pitch that stays, rises or falls: example ``i`` depends on the configuration and ``i`` alone."""

    Config: type[TonesConfig] = TonesConfig
    config: TonesConfig
    name = "tones"
    quick = True

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> Example:
        c = self.config
        if not 0 <= index < c.length:
            raise DataError(f"tones: example {index} was asked for, there are {c.length}")
        draw = Random(f"tones {c.split} {c.seed} {index}")
        pitch, course = draw.choice(list(PITCHES)), draw.choice(list(COURSES))
        sound = Audio(tone(draw, draw.uniform(*PITCHES[pitch]), COURSES[course]), rate=RATE)
        about = draw.choice(list(QUESTIONS)) if c.ask else "caption"
        answer = {"pitch": pitch, "course": course, "caption": f"A {pitch} {course} tone."}[about]
        question = (Text(QUESTIONS[about]),) if c.ask else ()
        turns = (Message("user", (sound, *question)), Message("assistant", (Text(answer),)))
        return Example(f"tones-{c.split}-{c.seed}-{index}", turns, task=f"tone_{about}", answers=(answer,))


def tone(draw: Random, start: float, times: float) -> np.ndarray:
    """Samples ``[n]`` of a tone that goes from ``start`` Hz to ``times`` as much, softly in and out, in some noise."""
    t = np.arange(int(RATE * draw.uniform(*SECONDS))) / RATE
    course = np.linspace(1.0, times, len(t))
    phase = 2 * np.pi * np.cumsum(start * course) / RATE
    swell = np.minimum(1.0, np.minimum(t, t[::-1]) / 0.02)
    noise = np.random.default_rng(draw.getrandbits(32)).normal(0.0, NOISE, len(t))
    return draw.uniform(0.2, 0.8) * swell * np.sin(phase) + noise
