"""The tour's code runs in order, and what it prints is what stands under it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

TOUR = Path(__file__).resolve().parents[2] / "docs" / "tour.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```)?", re.DOTALL)


def test_the_tour_prints_what_it_says():
    blocks = list(BLOCK.finditer(TOUR.read_text(encoding="utf-8")))
    assert len(blocks) > 20
    state = torch.random.get_rng_state()
    names: dict = {}
    try:
        for block in blocks:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block["code"], str(TOUR), "exec"), names)
            assert out.getvalue() == (block["printed"] or ""), block["code"]
    finally:
        torch.random.set_rng_state(state)


def test_the_tour_shows_the_way_to_every_step():
    text = TOUR.read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"^## (\d+)\.", text, re.MULTILINE)] == list(range(1, 16))
    assert (TOUR.parent / "tour.svg").read_text(encoding="utf-8").startswith("<svg")
