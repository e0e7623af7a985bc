"""Pictures drawn after SHAPES: answers read off the pixels, the rules and the look held against the real files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def like(of_benchmarks: Any) -> Any:
    """The benchmark's file as a module."""
    return of_benchmarks("shapes_like")


@pytest.fixture(scope="module")
def masks(like: Any) -> tuple[list[str], np.ndarray]:
    """Shapes of all sizes, and how they cover a cell ``[n, 100]``."""
    names = [(shape, step / 25) for shape in like.SHAPES for step in range(54, 106)]
    return [shape for shape, _ in names], np.stack([like.mask(*name).ravel() for name in names])


def read(like: Any, masks: tuple[list[str], np.ndarray], pixels: np.ndarray) -> tuple[Any, float]:
    """What stands in each cell, by the nearest mask, and the largest mean distance from one."""
    scene, worst = {}, 0.0
    for row in range(3):
        for column in range(3):
            cell = pixels[10 * row : 10 * row + 10, 10 * column : 10 * column + 10].astype(float)
            if cell.max() > 0:
                away = np.abs(masks[1] - (cell.max(2) / cell.max()).ravel()).mean(1)
                scene[row, column] = like.COLORS[cell.sum((0, 1)).argmax()], masks[0][away.argmin()]
                worst = max(worst, float(away.min()))
    return scene, worst


def test_the_rules(like: Any):
    """Steps go from a cell to the next one; a step over the edge leads nowhere."""
    scene = {(0, 0): ("red", "circle"), (0, 1): ("blue", "square"), (1, 0): ("green", "circle")}
    for asked, right in {
        "is a red shape left of a square": True,
        "is a circle left of a blue shape": True,
        "is a square left of a circle": False,
        "is a square above right of a green shape": True,  # the cell right of green, and what stands above it
        "is a circle above above a green shape": False,
        "is a circle below a circle": True,
        "is a green shape a square": False,
        "is a blue shape a square": True,
    }.items():
        assert like.answer(scene, asked) == right, asked


def test_answers_hold_for_the_pixels_and_words_alone_are_right_half_the_time(like: Any, masks: Any):
    """Of every question yes and no differ by one at most; turned pictures keep their answers."""
    source, draw, told = like.drawn(random.Random(3), (0, 1, 2)), random.Random(4), {}
    for _ in range(400):
        asked, _ = next(source)
        for pixels, text, right in (asked, like.turned(asked, draw)):
            assert like.answer(read(like, masks, pixels)[0], text) == right
        told.setdefault(asked[1], []).append(asked[2])
    assert all(abs(2 * sum(rights) - len(rights)) <= 1 for rights in told.values()) and len(told) > 150


@pytest.mark.data
def test_the_rules_and_the_look_are_those_of_the_files(like: Any, masks: Any, shared_data: Path):
    """The rules answer the real questions from the real pixels, and real cells are covered as drawn ones are."""
    told = [(text, *one) for text, found in like.files(str(shared_data / "shapes_vqa")).items() for one in found]
    found = [read(like, masks, pixels) for _, pixels, _ in told]
    wrong = [
        text for (text, _, right), (scene, _) in zip(told, found, strict=True) if like.answer(scene, text) != right
    ]
    assert (len(told), wrong) == (2688, [])
    assert max(away for _, away in found) < 0.012


@pytest.mark.data
def test_held_out_pictures_are_not_learned_from(like: Any, shared_data: Path):
    """Twelve of each of the 42 questions, none of them among the others."""
    learn, held = like.split(str(shared_data / "shapes_vqa"), 12)
    assert len(held) == 12 * 42
    assert not {pixels.tobytes() for pixels, _, _ in learn} & {pixels.tobytes() for pixels, _, _ in held}
