"""Drawing of single shapes with PIL."""

from __future__ import annotations

from math import cos, pi, sin

from PIL import ImageDraw

Color = tuple[int, int, int]


def draw_shape(pen: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, color: Color) -> None:
    """Shape ``name`` centred at (x, y), inside a square of side ``2 * radius`` pixels."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        pen.ellipse(box, fill=color)
    elif name == "ring":
        pen.ellipse(box, outline=color, width=max(1, round(radius * 0.45)))
    elif name == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif name == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)], fill=color)
    elif name == "cross":
        arm = radius * 0.34
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
    elif name == "star":
        points = []
        for i in range(10):
            reach = radius * 1.1 if i % 2 == 0 else radius * 0.45
            points.append((x + reach * sin(i * pi / 5), y - reach * cos(i * pi / 5)))
        pen.polygon(points, fill=color)
    else:
        raise ValueError(f"no shape is called {name!r}")
