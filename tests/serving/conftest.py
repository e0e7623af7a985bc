"""One tiny server for all tests of a file that change nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving_kit import Running, ready, serving, tiny


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory):
    return tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def running(vlm) -> Iterator[Running]:
    served = ready(vlm)
    with serving(served) as made:
        yield made
