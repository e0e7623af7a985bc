"""Loss curves as SVG, drawn here so that a report needs no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 32


@dataclass(frozen=True)
class Line:
    """One curve. ``kind`` is its CSS class: ``train``, ``held`` or ``mixed``; ``smooth`` adds a running mean."""

    name: str
    kind: str
    points: Points
    smooth: bool = False


def curve(lines: Sequence[Line], label: str) -> Markup:
    """Curves over a shared pair of axes. Returns an empty string where there is no point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    shown = [y for line in lines for y in _robust([y for _, y in line.points])]
    x0, x1 = min(0.0, min(xs)), max(xs)
    ticks = _ticks(min(0.0, min(shown)), max(shown))
    y0, y1 = ticks[0], max(ticks[-1], max(shown))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / max(1e-9, x1 - x0) * (WIDTH - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (min(y, y1) - y0) / max(1e-9, y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return across, up

    parts = [_open(label)]
    for tick in ticks:
        _, v = place(x0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1):
        if tick <= x1:
            h, _ = place(tick, y0)
            parts.append(
                f'<text class="tick" x="{h:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
            )
    for line in lines:
        if line.smooth:
            parts.append(_path(f"{line.kind} raw", [place(x, y) for x, y in line.points]))
        points = _smoothed(line.points) if line.smooth else line.points
        parts.append(_path(line.kind, [place(x, y) for x, y in points]))
        if not line.smooth or len(points) == 1:  # one point is no path
            dots = (place(x, y) for x, y in points)
            parts += [f'<circle class="{line.kind}" cx="{h:.1f}" cy="{v:.1f}" r="2.6"/>' for h, v in dots]
    return Markup("\n".join([*parts, "</svg>"]))  # numbers and our own words only: the label is escaped in _open


def _open(label: str) -> str:
    said = Markup.escape(label)
    return f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}"><title>{said}</title>'


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    moves = " ".join(f"{'M' if i == 0 else 'L'}{h:.1f} {v:.1f}" for i, (h, v) in enumerate(points))
    return f'<path class="{kind}" d="{moves}"/>'


def _smoothed(points: Points) -> Points:
    """A running mean over about a thirtieth of the curve to either side."""
    reach = max(1, len(points) // 30)
    result = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def _robust(values: Sequence[float]) -> list[float]:
    """The values without the highest two in a hundred, which would flatten the rest."""
    return sorted(values)[: max(1, math.ceil(0.98 * len(values)))]


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from ``low`` to at least near ``high``."""
    span = max(1e-9, high - low)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first = math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(math.ceil((high - first * step) / step) + 1)]
