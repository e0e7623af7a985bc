"""The front-end contract: a media part of a message in, tensors and their layout out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chiasm.config import PartConfig
from chiasm.types import Encoding, Layout, Media, MediaItem, Piece


class FrontEndConfig(PartConfig):
    """What a front end is built from. ``placeholder`` is the tokenizer's token whose id fills the media's slots."""

    placeholder: str | None = None

    @property
    def unit_shape(self) -> tuple[int, ...] | None:
        """The shape of one unit where all have the same; else None."""
        return None

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """The shape of a unit of some size, with which a built model's parts and counts are tried; None: not tried."""
        return self.unit_shape


@dataclass(frozen=True)
class Place:
    """Where a medium stands: what a front end needs to know beyond the medium, and what its errors name."""

    sample: str  # the sample's id
    index: int  # which medium of its kind in the sample, from 0
    of: int  # how many media of this kind the sample has

    def __str__(self) -> str:
        return f"sample {self.sample!r}, medium {self.index + 1} of {self.of}"


class FrontEnd:
    """Opens a medium and makes it tensors. Subclasses nest ``Config(FrontEndConfig)`` and take it as only argument.

    Errors are ``DataError`` and start with ``str(place)``.
    """

    Config: type[FrontEndConfig] = FrontEndConfig
    kind: str  # the modality it serves

    def __init__(self, config: FrontEndConfig):
        self.config = config

    def __call__(self, medium: Media, place: Place) -> MediaItem:
        """A media part → ``MediaItem``: ``inputs [U, *shape]`` (float32, contiguous), layout; slots come later."""
        raise NotImplementedError


class Counter(Protocol):
    """Gives the number of tokens a medium takes, before any model runs. Holds configurations only."""

    def __call__(self, kind: str, layout: Layout) -> int:
        """Tokens of one medium of this kind and layout."""
        ...


class TokenizerLike(Protocol):
    """What the processor needs of a tokenizer."""

    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    chat_template: Any
    generation_stops: Any
    tokens: Any
    specials: Any
    prefix: Any
    suffix: Any

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoding:
        """The tokens of a rendered conversation."""
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids."""
        ...

    def token_of(self, index: int) -> str | None:
        """The token of an id."""
        ...
