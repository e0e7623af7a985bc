"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="module")
def of_benchmarks() -> Iterator[Callable[[str], ModuleType]]:
    """Gives a file of ``benchmarks``, by its name, as a module; it is forgotten after the tests of a file."""
    made: list[str] = []

    def load(name: str) -> ModuleType:
        file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        made.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in made:
        del sys.modules[name]
