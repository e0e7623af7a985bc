"""The tokenizer: text that a user typed can never become a control token, and token ids are those of transformers.

A rendered conversation is a list of ``Piece``: user text, literals of the template, media. Only literals may hold
control tokens (``<s>``, ``<|im_end|>``, ``<image>``); the two backends, ``tokenizer_json`` and ``tokenizer_spm``,
keep that apart while they encode the whole conversation at once, so that prefix spaces and merges at the seams are
the published ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from chiasm.errors import CheckpointError, DataError, nearest
from chiasm.lm.tokenizer_files import NAMES, SECOND, TokenizerFiles
from chiasm.lm.tokenizer_json import JsonBackend
from chiasm.lm.tokenizer_spm import SpmBackend
from chiasm.types import Encoding, Piece


class Backend(Protocol):
    """What does the work: one for ``tokenizer.json``, one for ``tokenizer.model``."""

    controls: dict[str, int]  # control token → id
    vocab_size: int
    prefix: list[int]  # ids that belong before every text (BOS)
    suffix: list[int]  # ids that belong after every text (EOS)

    def encode(self, pieces: Sequence[Piece]) -> Encoding:
        """The tokens of a rendered conversation, without prefix and suffix."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of some ids."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        ...

    def token_of(self, index: int) -> str | None:
        """The token of an id as the vocabulary spells it."""
        ...


class Tokenizer:
    """A tokenizer read from the files of a checkpoint. Pickles to workers by those files."""

    def __init__(self, files: TokenizerFiles):
        self.files = files
        self._open()

    def _open(self) -> None:
        second = self.files.instruction
        self.instruction: Tokenizer | None = None if second is None else Tokenizer(second)
        backend: Backend = JsonBackend(self.files) if self.files.json is not None else SpmBackend(self.files)
        self.backend = backend
        named = self.files.named
        for role, token in named.items():
            if token not in backend.controls:
                known = nearest(token, backend.controls)
                raise CheckpointError(
                    f"{self.files.place}: the {role}_token {token!r} is not in the vocabulary; {known}"
                )
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            backend.controls.get(named[role]) if role in named else None for role in ("bos", "eos", "pad", "unk")
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` or ``tokenizer.model`` and the configuration beside it. Raises CheckpointError."""
        return cls(TokenizerFiles.read(Path(path)))

    def with_instruction(self, other: Tokenizer) -> Tokenizer:
        """This tokenizer, with ``other`` for a connector that reads the instruction; both are saved together."""
        second = {SECOND + name: held for name, held in other.files.content.items() if SECOND + name in NAMES}
        return Tokenizer(TokenizerFiles.parse({**self.files.content, **second}, self.files.place))

    def with_controls(self, tokens: Iterable[str]) -> Tokenizer:
        """This tokenizer with further control tokens, behind its last id, in their order; those it has are left out."""
        new = [token for token in tokens if token not in self.backend.controls]
        config = dict(self.files.config)
        listed = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = [*listed, *new]
        content = {**self.files.content, "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode()}
        return Tokenizer(TokenizerFiles.parse(content, self.files.place)) if new else self

    def save(self, folder: str | Path) -> None:
        """Write the files exactly as they were read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.content.items():
            (Path(folder) / name).write_bytes(content)

    # ------------------------------------------------------------------------------------------------ what it knows

    @property
    def specials(self) -> dict[str, int]:
        """Control token → id."""
        return dict(self.backend.controls)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return self.backend.vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} ids, {len(self.specials)} control tokens)"

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja chat template, where it has one."""
        return self.files.chat_template

    @property
    def generation_stops(self) -> tuple[int, ...]:
        """The ``eos_token_id`` list of ``generation_config.json``."""
        return self.files.generation_stops

    @property
    def prefix(self) -> list[int]:
        """The ids that belong before every text: BOS, where the tokenizer adds it."""
        return list(self.backend.prefix)

    @property
    def suffix(self) -> list[int]:
        """The ids that belong after every text: EOS, where the tokenizer adds it."""
        return list(self.backend.suffix)

    @property
    def tokens(self) -> dict[str, str]:
        """The named tokens: ``{"bos_token": "<s>", "eos_token": "</s>", ...}``, as chat templates want them."""
        return {f"{role}_token": token for role, token in self.files.named.items()}

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self.backend.id_of(token)

    def token_of(self, index: int) -> str | None:
        """The token of an id as the vocabulary spells it, or None."""
        return self.backend.token_of(int(index))

    # ------------------------------------------------------------------------------------------------ encode, decode

    def encode_pieces(self, pieces: Sequence[Piece]) -> Encoding:
        """The tokens of a rendered conversation. BOS and EOS are the caller's (``prefix``, ``suffix``).

        Raises DataError for a text that holds half of a surrogate pair, as a cut "\\ud83d" of JSON gives.
        """
        try:
            return self.backend.encode(pieces)
        except (TypeError, UnicodeEncodeError):
            for piece in pieces:
                if half := re.search("[\ud800-\udfff]", piece.text):
                    raise DataError(
                        f"the text {piece.text[max(0, half.start() - 20) : half.end() + 20]!a} holds half of a "
                        f"character ({half[0]!a}); take it out, or write the whole character"
                    ) from None
            raise

    def encode(self, text: str, special: bool = False, literal: bool = False) -> list[int]:
        """The ids of a text. ``special`` adds BOS/EOS as the tokenizer does; ``literal`` lets control tokens count."""
        ids = self.backend.encode([Piece(text, literal=literal)]).ids
        return [*self.backend.prefix, *ids, *self.backend.suffix] if special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; ``skip_special`` leaves special tokens out."""
        return self.backend.decode([int(i) for i in ids], skip_special)

    def decode_stream(self, ids: Iterable[int], skip_special: bool = True) -> Iterator[str]:
        """The text of ids that arrive one after another, given out as soon as whole characters are known.

        The pieces joined are ``decode`` of all the ids, except where a decoder strips across pieces.
        """
        stream = self.stream(skip_special)
        for index in ids:
            if text := stream.put(int(index)):
                yield text
        if text := stream.end():
            yield text

    def stream(self, skip_special: bool = True) -> DecodeStream:
        """A decoder that is fed ids one by one."""
        return DecodeStream(self, skip_special)

    # ------------------------------------------------------------------------------------------------ workers

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.files = state["files"]
        self._open()


class DecodeStream:
    """Text of ids that arrive one by one. An unfinished character is held back until its last byte is there.

    Decoding always starts a few tokens before the new ones, because what a token reads depends on those before it
    (prefix spaces, bytes of one character).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.ids: list[int] = []
        self.start = self.shown = 0  # ids[start:shown] is context that was given out already

    def put(self, index: int) -> str:
        """Take one id; returns the text that became certain (often empty)."""
        self.ids.append(index)
        return self._advance(final=False)

    def end(self) -> str:
        """The text still held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.shown], self.skip_special)
        now = self.tokenizer.decode(self.ids[self.start :], self.skip_special)
        if (now.endswith("\ufffd") and not final) or len(now) <= len(before):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return now[len(before) :]
