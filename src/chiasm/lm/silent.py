"""The tokenizer of a model that reads no text: it has no tokens, and refuses a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from chiasm.errors import DataError
from chiasm.types import Encoding, Piece


class Silent:
    """What a processor needs of a tokenizer, for pictures alone. Nothing of it is saved."""

    bos_id = eos_id = pad_id = unk_id = None
    chat_template = instruction = None
    generation_stops: tuple[int, ...] = ()
    tokens: dict[str, str] = {}  # noqa: RUF012
    specials: dict[str, int] = {}  # noqa: RUF012
    prefix: list[int] = []  # noqa: RUF012
    suffix: list[int] = []  # noqa: RUF012

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "no tokenizer"

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoding:
        """No tokens. Raises DataError for a text."""
        if any(piece.text for piece in pieces):
            raise DataError("this model reads no text; give it pictures alone")
        return Encoding([], [])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Nothing."""
        return ""

    def token_of(self, index: int) -> str | None:
        """None."""
        return None

    def save(self, folder: str | Path) -> None:
        """Writes nothing."""
