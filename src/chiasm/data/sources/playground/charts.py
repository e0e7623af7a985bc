"""Bar, line and pie charts with exact values."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from PIL import Image as Pictures
from PIL import ImageDraw

from chiasm.data.sources.playground.world import COLORS, Family, Question, Split, listed
from chiasm.types import Image, Media

TOP = 6  # the largest value of a bar or a point
OVERSAMPLE = 2
SLICES = (1, 2, 4, 7)  # shares of a pie, far enough apart to be told at a small size
INK = (90, 90, 90)


@dataclass(frozen=True)
class Chart:
    """``kind`` bar, line or pie; a value for each colour (bar, pie) or for each step (line, of one colour)."""

    kind: str
    colors: tuple[str, ...]
    values: tuple[int, ...]


class Charts(Family):
    """Values, extremes, counts and directions."""

    name = "chart"
    kinds = ("chart_type", "value", "highest", "lowest", "parts", "direction", "peak")
    balanced: ClassVar[dict[str, tuple[str, ...]]] = {
        "chart_type": ("bar", "line", "pie"),
        "parts": ("2", "3", "4"),
        "direction": ("up", "down"),
        "value": tuple(str(v) for v in range(1, TOP + 1)),
        "peak": tuple(str(v) for v in range(3, TOP + 1)),
    }

    def sample(self, rng: Random, split: Split) -> Chart:
        """Two to four bars or slices, or a line of four points; all values of bars and slices differ."""
        kind = rng.choice(("bar", "line", "pie"))
        if kind == "line":
            return Chart(kind, (rng.choice(list(COLORS)),), tuple(rng.randint(1, TOP) for _ in range(4)))
        count = rng.randint(2, 4)
        values = rng.sample(SLICES if kind == "pie" else range(1, TOP + 1), count)
        return Chart(kind, tuple(rng.sample(list(COLORS), count)), tuple(values))

    def describe(self, thing: Chart) -> str:
        """``a bar chart with red 3, blue 5 and pink 1``; ``a line chart in red with 1, 4, 2 and 6``."""
        if thing.kind == "line":
            return f"a line chart in {thing.colors[0]} with {listed([str(v) for v in thing.values])}"
        if thing.kind == "pie":
            by_size = sorted(zip(thing.values, thing.colors), reverse=True)
            return f"a pie chart with {listed([c for _, c in by_size])} from largest to smallest"
        parts = [f"{c} {v}" for c, v in zip(thing.colors, thing.values)]
        return f"a {thing.kind} chart with {listed(parts)}"

    def draw(self, thing: Chart, size: int, rng: Random) -> tuple[Media, ...]:
        """One picture."""
        side = size * OVERSAMPLE
        picture = Pictures.new("RGB", (side, side), (250, 250, 250))
        pen = ImageDraw.Draw(picture)
        {"bar": _bars, "line": _line, "pie": _pie}[thing.kind](pen, thing, side)
        return (Image(picture.reduce(OVERSAMPLE)),)

    def ask(self, thing: Chart, kind: str, rng: Random) -> Question | None:
        """A question of this kind, or None."""
        if kind == "chart_type":
            return Question(kind, "What kind of chart is this?", thing.kind)
        if thing.kind == "line":
            first, last = thing.values[0], thing.values[-1]
            if kind == "direction" and first != last:
                return Question(kind, "Does the line end up or down from its start?", "up" if last > first else "down")
            if kind == "peak":
                return Question(kind, "What is the highest value of the line?", str(max(thing.values)))
            return None
        part = "bar" if thing.kind == "bar" else "slice"
        if kind == "value" and thing.kind == "bar":
            i = rng.randrange(len(thing.values))
            return Question(kind, f"What is the value of the {thing.colors[i]} bar?", str(thing.values[i]))
        if kind == "parts":
            return Question(kind, f"How many {part}s are there?", str(len(thing.values)))
        if kind in ("highest", "lowest"):
            word = {
                "bar": {"highest": "tallest", "lowest": "shortest"},
                "pie": {"highest": "largest", "lowest": "smallest"},
            }
            value = (max if kind == "highest" else min)(thing.values)
            color = thing.colors[thing.values.index(value)]
            return Question(kind, f"What color is the {word[thing.kind][kind]} {part}?", color)
        return None


def _height(value: int, side: int) -> float:
    """The vertical pixel of a value: 0 sits on the axis."""
    return side * (0.92 - 0.84 * value / TOP)


def _axes(pen: ImageDraw.ImageDraw, side: int) -> None:
    for value in range(1, TOP + 1):
        pen.line((side * 0.08, _height(value, side), side * 0.96, _height(value, side)), fill=(218, 218, 218), width=2)
    pen.line((side * 0.08, side * 0.06, side * 0.08, side * 0.92), fill=INK, width=2)
    pen.line((side * 0.08, side * 0.92, side * 0.96, side * 0.92), fill=INK, width=2)


def _bars(pen: ImageDraw.ImageDraw, chart: Chart, side: int) -> None:
    _axes(pen, side)
    step = side * 0.84 / len(chart.values)
    for i, (color, value) in enumerate(zip(chart.colors, chart.values)):
        left = side * 0.11 + i * step
        pen.rectangle((left, _height(value, side), left + step * 0.72, side * 0.92), fill=COLORS[color])


def _line(pen: ImageDraw.ImageDraw, chart: Chart, side: int) -> None:
    _axes(pen, side)
    step = side * 0.8 / (len(chart.values) - 1)
    points = [(side * 0.12 + i * step, _height(v, side)) for i, v in enumerate(chart.values)]
    pen.line(points, fill=COLORS[chart.colors[0]], width=side // 24, joint="curve")
    dot = side / 22
    for x, y in points:
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=COLORS[chart.colors[0]])


def _pie(pen: ImageDraw.ImageDraw, chart: Chart, side: int) -> None:
    box = (side * 0.08, side * 0.08, side * 0.92, side * 0.92)
    angle = -90.0
    for color, value in zip(chart.colors, chart.values):
        end = angle + 360 * value / sum(chart.values)
        pen.pieslice(box, angle, end, fill=COLORS[color], outline=(250, 250, 250), width=2)
        angle = end
