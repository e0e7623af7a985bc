"""A tiny model of two towers and a folder of small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from retrieve_kit import picture, towers

from chiasm.vlm import VLM


@pytest.fixture(scope="session")
def vlm() -> VLM:
    return towers()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, a broken one, an empty one, and files that are no pictures."""
    folder = tmp_path / "photos"
    for i in range(12):
        picture(folder / ("a" if i % 2 else "b/c") / f"{i:02}.png", i)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this was a photo once")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    picture(folder / ".hidden" / "x.png", 99)
    return folder
