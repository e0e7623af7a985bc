"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_kit import build, make_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with random, non-degenerate weights."""
    root = tmp_path_factory.mktemp("saved")
    vlm = build(make_tokenizer(root / "tokenizer"))
    return vlm.save(root / "model")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"
