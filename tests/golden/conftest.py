"""Tokenizers are made once a session: building them from real vocabularies takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tokenizer_folders(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tokenizer_kit import all_folders

    return all_folders(tmp_path_factory.mktemp("tokenizers"), shared_data)


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict:
    from chiasm.lm.tokenizer import Tokenizer

    return {name: Tokenizer.from_folder(folder) for name, folder in tokenizer_folders.items()}
