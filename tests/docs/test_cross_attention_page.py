"""The page on cross-attention: its Python block runs, and what it prints is what the shipped parts give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_composition_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cross-attention.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    places, tokens, size = re.fullmatch(r"(\(.*\)) (\d+) (\d+)", capsys.readouterr().out.strip()).groups()
    assert places == "(0, 1, 2, 3)" and tokens == "1" and int(size) == 788_488
