"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent: tests on real data are skipped")
    return SHARED


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator, so that no test depends on the global one."""
    return torch.Generator().manual_seed(0)
