"""Rendered words: signs of two or three words, and short documents (a list of goods with their prices)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image as Pictures
from PIL import ImageDraw, ImageFont

from chiasm.data.sources.playground.scenes import background
from chiasm.data.sources.playground.world import COLORS, Family, Question, Split, listed
from chiasm.types import Image, Media

SIGN_WORDS = (
    "open",
    "exit",
    "stop",
    "slow",
    "taxi",
    "bank",
    "park",
    "zoo",
    "cafe",
    "gate",
    "lift",
    "bus",
    "shop",
    "pool",
)
GOODS = ("tea", "milk", "rice", "soap", "egg", "jam", "corn", "fish", "bread", "salt", "nuts", "plum")
INKS = ("black", "red", "blue", "green")


@dataclass(frozen=True)
class Sign:
    """Lines of one word each, in one colour."""

    lines: tuple[str, ...]
    color: str


@dataclass(frozen=True)
class Bill:
    """Goods with their prices, one a line."""

    goods: tuple[str, ...]
    prices: tuple[int, ...]


@lru_cache(maxsize=32)
def _font(size: int) -> Any:
    """PIL's built-in scalable font: no font of the system is read."""
    return ImageFont.load_default(size)


def _write(picture: Pictures.Image, lines: list[str], color: tuple[int, int, int], share: float, rng: Random) -> None:
    """Lines of text from the top left on, each ``share`` of the picture high."""
    side = picture.size[0]
    pen = ImageDraw.Draw(picture)
    x = side * (0.05 + rng.uniform(0, 0.05))
    y = side * (0.04 + rng.uniform(0, 0.06))
    for line in lines:
        pen.text((x, y), line, fill=color, font=_font(round(side * share)))
        y += side * share * 1.22


class Signs(Family):
    """Reading of words."""

    name = "sign"
    kinds = ("read", "read_line", "ink")

    def sample(self, rng: Random, split: Split) -> Sign:
        """Two or three words."""
        return Sign(tuple(rng.sample(SIGN_WORDS, rng.randint(2, 3))), rng.choice(INKS))

    def describe(self, thing: Sign) -> str:
        """``a red sign that says open exit``."""
        return f"a {thing.color} sign that says {' '.join(thing.lines)}"

    def draw(self, thing: Sign, size: int, rng: Random) -> tuple[Media, ...]:
        """One picture."""
        picture = Pictures.new("RGB", (size, size), background(rng))
        _write(picture, list(thing.lines), COLORS[thing.color], 0.25, rng)
        return (Image(picture),)

    def ask(self, thing: Sign, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        if kind == "read":
            return Question(kind, "What does the sign say?", " ".join(thing.lines))
        if kind == "read_line":
            line = rng.randrange(len(thing.lines))
            return Question(kind, f"What does line {line + 1} say?", thing.lines[line])
        return Question("ink", "What color are the words?", thing.color)


class Bills(Family):
    """Short documents: find a line, read its number, compare, add."""

    name = "bill"
    kinds = ("price", "dearest", "total", "item")

    def sample(self, rng: Random, split: Split) -> Bill:
        """Two or three goods with different prices of one digit."""
        count = rng.randint(2, 3)
        return Bill(tuple(rng.sample(GOODS, count)), tuple(rng.sample(range(1, 10), count)))

    def describe(self, thing: Bill) -> str:
        """``a bill with tea 3, milk 5 and rice 2``."""
        return f"a bill with {listed([f'{g} {p}' for g, p in zip(thing.goods, thing.prices)])}"

    def draw(self, thing: Bill, size: int, rng: Random) -> tuple[Media, ...]:
        """One picture."""
        picture = Pictures.new("RGB", (size, size), background(rng))
        _write(picture, [f"{g} {p}" for g, p in zip(thing.goods, thing.prices)], (20, 20, 20), 0.23, rng)
        return (Image(picture),)

    def ask(self, thing: Bill, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        i = rng.randrange(len(thing.goods))
        if kind == "price":
            return Question(kind, f"How much is the {thing.goods[i]}?", str(thing.prices[i]))
        if kind == "dearest":
            best = thing.prices.index(max(thing.prices))
            return Question(kind, "What costs the most?", thing.goods[best])
        if kind == "total":
            return Question(kind, "What is the total?", str(sum(thing.prices))) if len(thing.prices) == 2 else None
        return Question("item", f"What is on line {i + 1}?", thing.goods[i])
