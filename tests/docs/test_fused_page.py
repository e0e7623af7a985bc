"""The first block of the page on models that fuse runs as it stands, and what the page names is registered."""

from __future__ import annotations

import re
from pathlib import Path

from chiasm import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fused-models.md").read_text(encoding="utf-8")


def test_the_first_block_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    block = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    found: dict = {}
    exec(block, found)
    assert found["scores"].shape == (2,) and found["scores"][0] != found["scores"][1]


def test_objectives_and_fusions_are_registered():
    table = PAGE[PAGE.index("| objective |") : PAGE.index("**Which words are hidden**")]
    for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE):
        assert name in registry.names("objective"), name
    for name in re.findall(r"\| `(\w+)` \|$", PAGE[: PAGE.index("A picture takes no place")], re.MULTILINE):
        assert name in registry.names("fusion"), name
