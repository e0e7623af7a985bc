"""The ``tokenizer.model`` backend, on the sentencepiece library.

A conversation is cut at the control tokens of its literals and each section is encoded by itself, as the slow
tokenizers of transformers do. ``legacy`` (tokenizer_config.json) decides the prefix space: with it every section gets
one, without it only a section that opens the conversation. Control pieces are never matched in text by sentencepiece;
user-defined ones are, so those that serve as control tokens are made control pieces in a copy held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sentencepiece

from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer_files import Added, TokenizerFiles
from chiasm.lm.tokenizer_json import _scanner
from chiasm.types import Encoding, Piece

CONTROL = 3  # the type of a control piece in sentencepiece's ModelProto
SPACE = "▁"


class SpmBackend:
    """``tokenizer.model`` with control tokens that only literals can reach."""

    def __init__(self, files: TokenizerFiles):
        model = files.content["tokenizer.model"]
        self.plain = _processor(model, files.place)
        self._complete_named(files)
        self.added = self._place_tokens(files)
        self.flags = {t.content: t for t in self.added}
        self.controls = {t.content: t.id for t in self.added if t.content.strip() and t.id is not None}
        size = self.plain.get_piece_size()
        self.vocab_size = 1 + max([size - 1, *self.controls.values()])
        # transformers' Llama tokenizers are legacy unless their configuration says otherwise.
        self.legacy = bool(files.config.get("legacy", True))
        self.spaced = bool(_dummy_prefix(self.plain))
        if files.config.get("add_prefix_space") is False:
            self.spaced = False
        hidden = [i for i in self.controls.values() if i < size and not self.plain.is_unknown(i)]
        self.bare = _processor(_edit(model, hidden, dummy_prefix=False), files.place)
        self.prefixed = _processor(_edit(model, hidden, dummy_prefix=True), files.place)
        self.names = {index: token for token, index in self.controls.items()}
        self._scan = _scanner(self.controls)
        self.prefix = self._end(files, "bos", default=self.plain.bos_id() >= 0)
        self.suffix = self._end(files, "eos", default=False)

    def encode(self, pieces: Sequence[Piece]) -> Encoding:
        """Section by section between control tokens."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for section in self._sections(pieces):
            if len(section) == 2:
                index, piece = section
                ids.append(index)
                spans.append((piece, piece))
                continue
            text, owners, first = section
            for index, begin, end in self._encode_text(text, first):
                last = max(begin, end - 1)
                ids.append(index)
                spans.append((owners[min(begin, len(owners) - 1)], owners[min(last, len(owners) - 1)]))
        return Encoding(ids, spans)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Pieces joined, bytes put together, the one prefix space taken off."""
        out = bytearray()
        for index in ids:
            if index in self.names:
                flag = self.flags[self.names[index]]
                out += b"" if skip_special and flag.special else self.names[index].encode()
            elif self.plain.is_byte(index):
                out.append(int(self.plain.id_to_piece(index)[3:-1], 16))
            else:
                out += self.plain.id_to_piece(index).replace(SPACE, " ").encode()
        text = out.decode("utf-8", errors="replace")
        return text[1:] if self.spaced and text.startswith(" ") else text

    def id_of(self, token: str) -> int | None:
        """From the added tokens, then from the model."""
        if token in self.controls:
            return self.controls[token]
        index = self.plain.piece_to_id(token)
        return index if self.plain.id_to_piece(index) == token else None

    def token_of(self, index: int) -> str | None:
        """From the added tokens, then from the model."""
        if index in self.names:
            return self.names[index]
        return self.plain.id_to_piece(index) if 0 <= index < self.plain.get_piece_size() else None

    def _sections(self, pieces: Sequence[Piece]) -> Iterator[Any]:
        """Either ``(id, piece)`` of a control token, or ``(text, piece of each character, opens the conversation)``."""
        parts: list[Any] = []
        for number, piece in enumerate(pieces):
            if piece.medium is not None:
                index = self.id_of(piece.text) if piece.text else None
                parts.append((piece.text, -1 if index is None else index, number))
                continue
            place = 0
            for match in self._scan.finditer(piece.text) if piece.literal else ():
                parts.append((piece.text[place : match.start()], number))
                parts.append((match.group(), self.controls[match.group()], number))
                place = match.end()
            parts.append((piece.text[place:], number))
        text, owners, opening, cut = "", [], True, False
        for item in [*parts, None]:
            if item is not None and len(item) == 2:
                text += item[0]
                owners += [item[1]] * len(item[0])
                continue
            flag = self.flags.get(item[0]) if item is not None else None
            if cut:
                strip = len(text) - len(text.lstrip())
                text, owners = text[strip:], owners[strip:]
            if flag is not None and flag.lstrip:
                text = text.rstrip()
            if text:
                yield text, owners, opening
            if item is not None:
                yield item[1], item[2]
            text, owners, opening, cut = "", [], False, flag is not None and flag.rstrip

    def _encode_text(self, text: str, first: bool) -> list[tuple[int, int, int]]:
        """``(id, begin, end)`` of a section's tokens, places in characters."""
        if self.spaced and (self.legacy or first):
            return _tokens(self.prefixed, text)
        if text[0] not in (SPACE, " "):
            return _tokens(self.bare, text)
        # A model that removes leading white space would lose this one: transformers protects it by a word before it.
        guard = "<unk>"
        skip = len(self.bare.encode(guard))
        return [(i, b - len(guard), e - len(guard)) for i, b, e in _tokens(self.bare, guard + text)[skip:]]

    def _complete_named(self, files: TokenizerFiles) -> None:
        """Named tokens that the configuration leaves out are the model's own."""
        ids = {"bos": self.plain.bos_id(), "eos": self.plain.eos_id(), "unk": self.plain.unk_id()}
        for role, index in {**ids, "pad": self.plain.pad_id()}.items():
            if index >= 0:
                files.named.setdefault(role, self.plain.id_to_piece(index))

    def _place_tokens(self, files: TokenizerFiles) -> list[Added]:
        """Control pieces of the model, then the added tokens, each with its id."""
        size = self.plain.get_piece_size()
        known = {
            self.plain.id_to_piece(i): i for i in range(size) if self.plain.is_control(i) or self.plain.is_unknown(i)
        }
        placed = {token: Added(token, index) for token, index in known.items()}
        following = size
        named = [Added(token) for token in files.named.values()]
        for token in sorted([*files.added, *named], key=lambda t: (t.id is None, t.id or 0)):
            if token.content in placed and token.id is None:
                continue
            own = self.plain.piece_to_id(token.content)
            inside = self.plain.id_to_piece(own) == token.content
            index = own if inside else token.id if token.id is not None else following
            if token.id is not None and index != token.id:
                raise CheckpointError(
                    f"{files.place}: the added token {token.content!r} should have id {token.id} but tokenizer.model "
                    f"gives "
                    f"it {index}; the two files belong to different tokenizers"
                )
            following = max(following, index + 1)
            flags = {k: getattr(token, k) for k in ("special", "lstrip", "rstrip", "normalized", "single_word")}
            placed[token.content] = Added(token.content, index, **flags)
        return list(placed.values())

    def _end(self, files: TokenizerFiles, role: str, default: bool) -> list[int]:
        wanted = files.config.get(f"add_{role}_token")
        wanted = default if wanted is None else wanted
        return [self.controls[files.named[role]]] if wanted and role in files.named else []


def _tokens(processor: Any, text: str) -> list[tuple[int, int, int]]:
    """``(id, begin, end)`` of a text's tokens, places in characters.

    Read from the serialised SentencePieceText (pieces: field 2; in them id: 2, begin: 4, end: 5, in bytes), the one
    form that every version of the library gives without the protobuf package.
    """
    chars, place = {}, 0
    for number, char in enumerate(text):
        chars[place] = number
        place += len(char.encode("utf-8", errors="surrogatepass"))
    chars[place] = len(text)
    tokens = []
    for field, body in _fields(processor.encode(text, out_type="serialized_proto")):
        if field == 2:
            values = {f: v for f, v in _fields(body) if isinstance(v, int)}
            tokens.append((values.get(2, 0), chars[values.get(4, 0)], chars[values.get(5, 0)]))
    return tokens


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """``(field number, value)`` of a protobuf message: integers, and bytes for everything else."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size, place = {1: (8, place), 5: (4, place)}.get(tag & 7) or _varint(data, place)
        yield tag >> 3, data[place : place + size]
        place += size


def _processor(model: bytes, place: str) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except Exception as error:  # the library raises bare RuntimeError and others
        raise CheckpointError(f"{place}/tokenizer.model: {error}") from None
    return processor


def _dummy_prefix(processor: Any) -> bool:
    """True where the model puts a space before a text."""
    pieces = processor.encode("a", out_type=str)
    return "".join(pieces).startswith(SPACE)


def _edit(model: bytes, controls: Sequence[int], dummy_prefix: bool) -> bytes:
    """The serialised ModelProto with some pieces made control pieces and the prefix space switched.

    In protobuf the last value of a scalar field wins, so a field is changed by writing it again at the end of its
    message.
    """
    out, place, piece, wanted = bytearray(), 0, 0, set(controls)
    seen = False
    while place < len(model):
        tag, place = _varint(model, place)
        if tag & 7 != 2:
            raise CheckpointError("tokenizer.model is not a sentencepiece model")
        size, place = _varint(model, place)
        body = model[place : place + size]
        place += size
        if tag >> 3 == 1:  # SentencePiece
            if piece in wanted:
                body += bytes([3 << 3, CONTROL])
            piece += 1
        elif tag >> 3 == 3:  # NormalizerSpec
            body += bytes([3 << 3, int(dummy_prefix)])
            seen = True
        out += _written(tag) + _written(len(body)) + body
    if not seen:
        out += _written(3 << 3 | 2) + _written(2) + bytes([3 << 3, int(dummy_prefix)])
    return bytes(out)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
