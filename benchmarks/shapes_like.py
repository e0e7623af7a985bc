"""SHAPES (Andreas et al., arXiv:1511.02799): its files, its rules, and any number of pictures drawn after them.

A picture has 30 by 30 pixels in nine cells; a cell is empty or holds a red, green or blue circle, square or triangle.
A question is about one cell ("is a red shape a square?") or follows steps from one cell to the next ("is a circle left
of above a square?": is there a square with a circle left of the cell above it). The files hold blue before red, as
cairo writes pixels; here red comes first. The rules give the files' answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS, SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle")
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # row, column
SIDE, CELL = 3, 10  # cells in a row, pixels in a cell
RADII = (2.25, 2.75), (3.2, 4.1)  # small ones and large ones
PARTS = ("train.tiny", "train.small", "val", "test")

Place = tuple[int, int]
Scene = dict[Place, tuple[str, str]]  # where something is: its colour and its shape
Asked = tuple[Any, str, bool]  # pixels [30, 30, 3] uint8, question, answer


# ------------------------------------------------------------------------------------------------ the rules


def pointed(scene: Scene, question: str) -> set[Place]:
    """Where the first thing stands that SHAPES asks for: step by step backwards from the cells of the last thing."""
    first, *steps, last = [word for word in question.split() if word not in ("is", "a", "of", "shape")]
    places = {place for place, what in scene.items() if last in what}
    for step in reversed(steps):
        places = {(row + STEPS[step][0], column + STEPS[step][1]) for row, column in places}
        places = {place for place in places if max(place) < SIDE and min(place) >= 0}
    return {place for place in places if first in scene.get(place, ())}


def answer(scene: Scene, question: str) -> bool:
    """What SHAPES says: whether there is such a thing."""
    return bool(pointed(scene, question))


def around(scene: Scene, place: Place) -> list[bool]:
    """Of a cell and of the four next to it: is it red, green, blue, a circle, a square, a triangle."""
    cells = [(place[0] + row, place[1] + column) for row, column in ((0, 0), *STEPS.values())]
    return [word in scene.get(cell, ()) for cell in cells for word in COLORS + SHAPES]


def question(first: str, steps: Sequence[str], last: str) -> str:
    """SHAPES' words: "is a square left of above a red shape"."""
    words = ["is a", f"{first} shape" if first in COLORS else first]
    words += [f"{step} of" if step in ("left", "right") else step for step in steps]
    if last in SHAPES:
        words.append(f"a {last}")
    else:
        words.append(f"a {last} shape" if steps else last)
    return " ".join(words)


# ------------------------------------------------------------------------------------------------ drawing


def scene(draw: random.Random, full: float = 0.8) -> Scene:
    """Nine cells, which something stands in with the chance ``full``; SHAPES has one in five empty."""
    places = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    return {place: (draw.choice(COLORS), draw.choice(SHAPES)) for place in places if draw.random() < full}


@cache
def mask(shape: str, radius: float) -> Any:
    """How much of each pixel of a cell is covered ``[10, 10]``, from 0 to 1."""
    fine = 16
    picture = Image.new("L", (CELL * fine,) * 2)
    low, high = (CELL / 2 - radius) * fine, (CELL / 2 + radius) * fine
    pen = ImageDraw.Draw(picture)
    if shape == "triangle":
        pen.polygon([(CELL * fine / 2, low), (low, high), (high, high)], fill=255)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)((low, low, high, high), fill=255)
    return np.asarray(picture, np.float32).reshape(CELL, fine, CELL, fine).mean((1, 3)) / 255


def picture(scene: Scene, draw: random.Random) -> Any:
    """The scene's pixels ``[30, 30, 3]``: sizes and shades by chance, as in SHAPES."""
    pixels = np.zeros((SIDE * CELL, SIDE * CELL, 3), np.float32)
    for (row, column), (color, shape) in scene.items():
        pure = [float(color == name) for name in COLORS]
        shade = [min(1.0, max(0.0, part + draw.uniform(-0.2, 0.2))) for part in pure]
        covered = mask(shape, round(draw.uniform(*draw.choice(RADII)), 2))
        pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = covered[:, :, None] * shade
    return np.uint8(pixels * 255)


def drawn(draw: random.Random, steps: tuple[int, ...]) -> Iterator[tuple[Asked, Scene]]:
    """Drawn pictures, each with a question of so many steps, and what stands where.

    Yes and no take turns, question by question. So words alone are right half the time, and what is never so, as a red
    shape that is green, is asked once at most. Nor does it help to know what is there but not where: other steps
    between the same two would be answered otherwise.
    """
    due: dict[str, bool] = {}
    while True:
        cells = scene(draw, draw.uniform(0.2, 0.9))
        for _ in range(12):
            count, first, last = draw.choice(steps), draw.choice(COLORS + SHAPES), draw.choice(COLORS + SHAPES)
            asked, other = (question(first, draw.choices(list(STEPS), k=count), last) for _ in range(2))
            right = answer(cells, asked)
            if (not count or answer(cells, other) != right) and due.setdefault(asked, draw.random() < 0.5) == right:
                due[asked] = not right
                yield (picture(cells, draw), asked, right), cells
                break


# ------------------------------------------------------------------------------------------------ the files


def files(folder: str) -> dict[str, list[tuple[Any, bool]]]:
    """Of each question of SHAPES all pictures, red first, with their answers; a picture that is there twice is one."""
    found: dict[str, dict[bytes, tuple[Any, bool]]] = {}
    for part in PARTS:
        held = np.load(Path(folder) / "shapes_dataset" / f"{part}.npz")
        asked = (Path(folder) / "shapes_dataset" / f"{part}.query_str.txt").read_text().splitlines()
        for pixels, right, text in zip(held["images"][..., ::-1], held["answers"], asked, strict=True):
            found.setdefault(text, {})[pixels.tobytes()] = pixels, bool(right)
    return {text: list(told.values()) for text, told in found.items()}


def split(folder: str, held: int) -> tuple[list[Asked], list[Asked]]:
    """What to learn from, and ``held`` pictures of each question, which are in no other question either."""
    draw, learn, out = random.Random(0), [], []
    for text, told in files(folder).items():
        draw.shuffle(told)
        out += [(pixels, text, right) for pixels, right in told[:held]]
        learn += [(pixels, text, right) for pixels, right in told[held:]]
    hidden = {pixels.tobytes() for pixels, _, _ in out}
    return [asked for asked in learn if asked[0].tobytes() not in hidden], out


def turned(asked: Asked, draw: random.Random) -> Asked:
    """The same question in other colours and from another side: the answer stays.

    Red, green and blue are exchanged, in the picture and in the words; and whole cells are moved as a turn or a mirror
    would move them, so that triangles still point upwards, and the steps are renamed.
    """
    pixels, text, right = asked
    order = draw.sample(range(3), 3)
    names = {COLORS[channel]: COLORS[place] for place, channel in enumerate(order)}
    cells = pixels.reshape(SIDE, CELL, SIDE, CELL, 3)[..., order].swapaxes(1, 2)  # [row, column, 10, 10, 3]
    swap, *flips = (draw.random() < 0.5 for _ in range(3))
    if swap:
        cells = cells.swapaxes(0, 1)
    cells = cells[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    called = {step: name for name, step in STEPS.items()}
    for name, step in STEPS.items():
        row, column = step[::-1] if swap else step
        names[name] = called[-row if flips[0] else row, -column if flips[1] else column]
    whole = np.ascontiguousarray(cells.swapaxes(1, 2)).reshape(pixels.shape)
    return whole, " ".join(names.get(word, word) for word in text.split()), right
