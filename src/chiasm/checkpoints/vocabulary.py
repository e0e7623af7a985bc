"""Whether a tokenizer is the one that a folder's weights were trained with: the rows of an embedding have no names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.errors import CheckpointError, ConfigError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.lm.tokenizer_files import TokenizerFiles

READERS = ("lm", "encoders.text")  # the parts whose rows are tokens


def check_vocabulary(part: str, folder: Path, tokenizer: Any) -> None:
    """Compare ``tokenizer`` with the one in ``folder``, id by id. Raises ConfigError with the first that differs.

    Control tokens may differ, and either may have more tokens behind its last shared id. Nothing is compared where the
    folder holds no tokenizer that can be read, or where ``folder`` is a file.
    """
    if part not in READERS or not isinstance(tokenizer, Tokenizer) or not folder.is_dir():
        return
    try:
        theirs = Tokenizer(TokenizerFiles.read(folder))
    except (CheckpointError, ConfigError):
        return
    if theirs.files.content == tokenizer.files.content:
        return
    controls = {*tokenizer.specials.values(), *theirs.specials.values()}
    shared = [i for i in range(min(len(tokenizer), len(theirs))) if i not in controls]
    other = [i for i in shared if tokenizer.token_of(i) != theirs.token_of(i)]
    if other:
        first = other[0]
        raise ConfigError(
            f"{part}: weights from {folder}, where token {first} is {theirs.token_of(first)!r}; in the model's own "
            f"tokenizer ({tokenizer.files.place}) it is {tokenizer.token_of(first)!r}, and {len(other)} of "
            f"{len(shared)} tokens differ: every word would be read as another. Set tokenizer to {folder}; to train "
            "its words anew, name the file of the weights instead of the folder"
        )
