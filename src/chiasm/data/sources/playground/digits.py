"""Handwritten digits in scenes: the 1,797 digits that scikit-learn ships (8 × 8 pixels, UCI), in colour, one to three.

The handwriting itself is split by its index, so that no digit seen in training is drawn in a held-out picture.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import ClassVar

import numpy as np
from PIL import Image as Pictures

from chiasm.data.sources.playground.scenes import PLACES, SHAPES, SIZES, Scene, Scenes, Thing, paint, shorthand, vary
from chiasm.data.sources.playground.world import COLORS, Family, Question, Split
from chiasm.errors import DataError
from chiasm.types import Image, Media

WIDTH = 0.31  # of a digit, as a share of the picture's


@lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Ink ``[1797, 8, 8]`` in 0…255 and labels ``[1797]``. Raises DataError where scikit-learn is absent."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the playground's digits come with scikit-learn: pip install 'chiasm[demo]', or leave the digit tasks out"
        ) from None
    stored = load_digits()
    return np.minimum(stored.images * 16, 255).astype(np.uint8), stored.target


def handwriting_split(index: int) -> Split:
    """Seven tenths of the stored digits are for training, one for validation, two for the test."""
    return "test" if index % 10 < 2 else "validation" if index % 10 == 2 else "train"


@lru_cache(maxsize=3)
def pool(split: Split) -> dict[str, list[int]]:
    """Indices of the stored digits of a split, by digit."""
    found: dict[str, list[int]] = {str(d): [] for d in range(10)}
    for index, label in enumerate(handwriting()[1]):
        if handwriting_split(index) == split:
            found[str(label)].append(index)
    return found


class Digits(Family):
    """Which digit, where, of which colour; the largest, the smallest, the sum."""

    name = "digit"
    kinds: tuple[str, ...] = (
        *("digit_of_color", "digit_at", "color_of_digit", "count_digits"),
        *("largest", "smallest", "sum", "greater"),
    )
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {"greater": ("yes", "no"), "count_digits": ("1", "2", "3")}

    def sample(self, rng: Random, split: Split) -> Scene:
        """One to three digits of different colours, and a shape in a third of the pictures."""
        count = rng.randint(1, 3)
        extra = rng.random() < 0.33
        places = sorted(rng.sample(range(9), count + extra))
        colors = rng.sample(list(COLORS), count + extra)
        shape = rng.randrange(len(places)) if extra else -1
        things = []
        for i, place in enumerate(places):
            if i == shape:
                other = Scenes().sample(rng, split)[0]
                things.append(Thing(other.name, colors[i], other.size, place))
            else:
                digit = str(rng.randrange(10))
                things.append(Thing(digit, colors[i], "", place, ink=rng.choice(pool(split)[digit])))
        return tuple(things)

    def describe(self, thing: Scene) -> str:
        """``at the top left a red 7 and at the center a small blue star``."""
        return Scenes().describe(thing)

    def shorthand(self, thing: Scene) -> str | None:
        """``void red7 void …``: nine words, row by row."""
        return shorthand(thing)

    def draw(self, thing: Scene, size: int, rng: Random) -> tuple[Media, ...]:
        """One picture; each digit is turned and sized a little differently."""
        picture = paint(thing, size, rng)
        for t in thing:
            if t.ink is not None:
                _write(picture, t, size, rng)
        return (Image(picture),)

    def ask(self, thing: Scene, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        digits = [t for t in thing if t.ink is not None]
        values = [int(t.name) for t in digits]
        target = rng.choice(digits)
        if kind == "digit_of_color":
            return Question(kind, f"What is the {target.color} digit?", target.name)
        if kind == "digit_at":
            return Question(kind, f"What digit is at the {PLACES[target.place]}?", target.name)
        if kind == "color_of_digit" and values.count(int(target.name)) == 1:
            return Question(kind, f"What color is the {target.name}?", target.color)
        if kind == "count_digits":
            return Question(kind, "How many digits are there?", str(len(digits)))
        if kind in ("largest", "smallest") and len(digits) > 1:
            return Question(kind, f"What is the {kind} digit?", str(max(values) if kind == "largest" else min(values)))
        if kind == "sum" and len(digits) == 2:
            return Question(kind, "What is the sum of the digits?", str(sum(values)))
        if kind == "greater" and len(digits) > 1:
            a, b = rng.sample(digits, 2)
            if a.name != b.name:
                answer = "yes" if int(a.name) > int(b.name) else "no"
                return Question(kind, f"Is the {a.color} digit greater than the {b.color} digit?", answer)
        return None


class Crowds(Digits):
    """A number of shapes and digits in one picture, of any colours. For training towers, not for questions."""

    kinds = ("caption",)
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, name: str, fewest: int, most: int):
        self.name, self.fewest, self.most = name, fewest, most

    def sample(self, rng: Random, split: Split) -> Scene:
        """Things with independent colours; four in ten are digits."""
        things = []
        for place in sorted(rng.sample(range(9), rng.randint(self.fewest, self.most))):
            color = rng.choice(list(COLORS))
            if rng.random() < 0.4:
                digit = str(rng.randrange(10))
                things.append(Thing(digit, color, "", place, ink=rng.choice(pool(split)[digit])))
            else:
                things.append(Thing(rng.choice(SHAPES), color, rng.choice(SIZES), place))
        return tuple(things)


def _write(picture: Pictures.Image, thing: Thing, size: int, rng: Random) -> None:
    """Lay the handwriting of a digit over the picture, in its colour."""
    assert thing.ink is not None
    width = round(WIDTH * size * rng.uniform(0.94, 1.06))
    mask = Pictures.fromarray(handwriting()[0][thing.ink]).resize((width, width), Pictures.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-10, 10), Pictures.Resampling.BILINEAR)
    x = round(((thing.column + 0.5) / 3 + rng.uniform(-0.02, 0.02)) * size - width / 2)
    y = round(((thing.row + 0.5) / 3 + rng.uniform(-0.02, 0.02)) * size - width / 2)
    picture.paste(vary(COLORS[thing.color], rng), (x, y), mask)
