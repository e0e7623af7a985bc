"""The ``tokenizer.json`` backend, on the tokenizers library.

The library looks for added tokens inside whatever text it is given, so a user could type ``<|im_end|>`` and get the
control token. Here every added token is renamed, in a copy of the JSON held in memory, to one private-use character
that no text contains; literals of the template are written with those characters. The whole conversation is then
encoded in one call: sections, prefix spaces and the ``lstrip``, ``rstrip`` and ``normalized`` flags act exactly as
they do in transformers.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from chiasm.errors import CheckpointError, DataError
from chiasm.lm.tokenizer_files import Added, TokenizerFiles
from chiasm.types import Encoding, Piece

PLANES = (0xF0000, 0x100000)  # the private-use planes 15 and 16
MEDIUM = ""  # the name, among the renamed tokens, of a medium whose placeholder is no added token


class JsonBackend:
    """``tokenizer.json`` with added tokens that only literals can reach."""

    def __init__(self, files: TokenizerFiles):
        assert files.json is not None
        self.place = files.place
        body = {**files.json, "truncation": None, "padding": None}
        self.true = _library(json.dumps(body), self.place)
        self.added = _place_tokens(self.true, files)
        # A token of nothing but white space is ordinary text that happens to be listed.
        self.controls = {t.content: t.id for t in self.added if t.content.strip() and t.id is not None}
        self.vocab_size = 1 + max(self.true.get_vocab(with_added_tokens=True).values(), default=-1)
        self.prefix, self.suffix = self._ends(files)
        self._fussy = any(t.single_word or t.normalized for t in self.added)
        self._body = body
        self._scan = _scanner(self.controls)
        self._renamed = lru_cache(maxsize=4)(self._rename)

    def encode(self, pieces: Sequence[Piece]) -> Encoding:
        """All pieces in one call; each token with the pieces it overlaps."""
        typed = "".join(piece.text for piece in pieces)
        base = self._base(typed)
        library, ids, sentinels = self._renamed(base)
        written = [self._write(piece, sentinels) for piece in pieces]
        encoding = library.encode("".join(written), add_special_tokens=False)
        if self._restore(written, encoding, ids, sentinels):
            encoding = library.encode("".join(written), add_special_tokens=False)
        starts = _starts(written)
        spans = []
        for begin, end in encoding.offsets:
            first = _piece_at(starts, begin, len(written))
            spans.append((first, max(first, _piece_at(starts, max(begin, end - 1), len(written)))))
        out = [ids.get(i, i) for i in encoding.ids]
        for position, (first, last) in enumerate(spans):
            medium = pieces[first].medium if pieces else None
            if medium is not None and first == last and out[position] == -1:
                out[position] = _or(self.id_of(pieces[first].text), -1)
        return Encoding(out, spans)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The library's decoding, with nothing cleaned up."""
        return self.true.decode(list(ids), skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        """From the vocabulary, added tokens included."""
        return self.true.token_to_id(token)

    def token_of(self, index: int) -> str | None:
        """From the vocabulary, added tokens included."""
        return self.true.id_to_token(index)

    def _write(self, piece: Piece, sentinels: dict[str, str]) -> str:
        if piece.medium is not None:
            return sentinels.get(piece.text, sentinels[MEDIUM]) if piece.text else sentinels[MEDIUM]
        if piece.literal:
            return self._scan.sub(lambda match: sentinels[match.group()], piece.text)
        return piece.text

    def _restore(self, written: list[str], encoding: Any, ids: dict[int, int], sentinels: dict[str, str]) -> bool:
        """Spell out again the tokens that the library did not take, because of their flags; True where there are any.

        A ``single_word`` token inside a word, or a ``normalized`` one whose normal form has a prefix space, is ordinary
        text in transformers too.
        """
        if not self._fussy:
            return False
        names = {character: token for token, character in sentinels.items()}
        joined = "".join(written)
        found = re.compile(f"[{min(names)}-{max(names)}]")
        characters = {self.controls.get(token, -1): character for token, character in sentinels.items()}
        taken = [
            span
            for index, span in zip(encoding.ids, encoding.offsets)
            if characters.get(ids.get(index, -2), "\0") in joined[slice(*span)]
        ]
        lost = [m.start() for m in found.finditer(joined) if not any(a <= m.start() < b for a, b in taken)]
        starts = _starts(written)
        for place in reversed(lost):
            number = _piece_at(starts, place, len(written))
            inside = place - starts[number]
            text = written[number]
            written[number] = text[:inside] + names[text[inside]] + text[inside + 1 :]
        return bool(lost)

    def _base(self, text: str) -> int:
        """The first of a run of private-use characters that the text has none of."""
        size = len(self.controls) + 1
        if text.isascii():
            return PLANES[0]
        used = sorted({ord(c) for c in text if ord(c) >= PLANES[0]})
        for plane in PLANES:
            for base in range(plane, plane + 0xFFFE - size, size):
                place = bisect_right(used, base - 1)
                if place == len(used) or used[place] >= base + size:
                    return base
        raise DataError("the text uses the whole private-use planes of Unicode, of which one run must stay free")

    def _rename(self, base: int) -> tuple[Library, dict[int, int], dict[str, str]]:
        """The library with renamed added tokens, its ids → the true ids, and control token → its character."""
        names = {token: chr(base + i) for i, token in enumerate([MEDIUM, *self.controls])}
        body = copy.deepcopy({k: v for k, v in self._body.items() if k != "model"})
        body["post_processor"] = None
        body["model"] = _rename_model(self._body["model"], names, self.place)
        flags = {t.content: t for t in self.added}
        body["added_tokens"] = []
        library = _library(json.dumps(body), self.place)
        for token in self.added:
            name = names.get(token.content, token.content)
            library.add_tokens([_added_token(name, flags[token.content])])
        library.add_special_tokens([AddedToken(names[MEDIUM], normalized=False, special=True)])
        ids: dict[int, int] = {}
        for token in self.added:
            index = library.token_to_id(names.get(token.content, token.content))
            if index is not None and token.id is not None:
                ids[index] = token.id
        medium = library.token_to_id(names[MEDIUM])
        assert medium is not None
        ids[medium] = -1
        return library, ids, names

    def _ends(self, files: TokenizerFiles) -> tuple[list[int], list[int]]:
        """BOS and EOS: what the configuration says, else what the post-processor puts around a text."""
        if "add_bos_token" in files.config or "add_eos_token" in files.config:
            ends = []
            for role in ("bos", "eos"):
                token = files.named.get(role)
                wanted = token is not None and bool(files.config.get(f"add_{role}_token"))
                ends.append([self.controls[token]] if wanted and token else [])
            return ends[0], ends[1]
        bare = self.true.encode("a", add_special_tokens=False).ids
        full = self.true.encode("a", add_special_tokens=True).ids
        extra = len(full) - len(bare)
        for start in range(extra + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def __getstate__(self) -> Any:
        raise TypeError("a backend is rebuilt from its files, not pickled")


def _library(text: str, place: str) -> Library:
    try:
        return Library.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{place}/tokenizer.json: {error}") from None


def _place_tokens(library: Library, files: TokenizerFiles) -> list[Added]:
    """Add what the JSON lacks, in the order of the ids; returns every added token with its id."""
    listed = {t["content"] for t in (files.json or {}).get("added_tokens", [])}
    missing = [t for t in files.added if t.content not in listed]
    for token in sorted(missing, key=lambda t: (t.id is None, t.id or 0)):
        library.add_tokens([_added_token(token.content, token)])
    placed = []
    for token in files.added:
        index = library.token_to_id(token.content)
        if token.id is not None and index != token.id:
            raise CheckpointError(
                f"{files.place}: the added token {token.content!r} should have id {token.id} but the vocabulary "
                f"gives it "
                f"{index}; tokenizer.json and the configuration beside it belong to different tokenizers"
            )
        flags = {k: getattr(token, k) for k in ("special", "lstrip", "rstrip", "normalized", "single_word")}
        placed.append(Added(token.content, index, **flags))
    return placed


def _added_token(content: str, token: Added) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _rename_model(model: dict[str, Any], names: dict[str, str], place: str) -> dict[str, Any]:
    """The model with its vocabulary entries renamed, and without the merges that would spell a renamed one."""
    model = dict(model)
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        if clash := sorted(set(names.values()) & vocab.keys()):
            raise CheckpointError(f"{place}: the vocabulary holds the private-use character {clash[0]!r}")
        model["vocab"] = {names.get(k, k) if k else k: v for k, v in vocab.items()}
    elif isinstance(vocab, list):  # unigram: [piece, score]
        model["vocab"] = [[names.get(p, p) if p else p, score] for p, score in vocab]
    if "merges" in model:
        merges = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if not {left, right, left + right} & (names.keys() - {MEDIUM}):
                merges.append(merge)
        model["merges"] = merges
    if model.get("unk_token") in names and model.get("unk_token"):
        model["unk_token"] = names[model["unk_token"]]
    return model


def _scanner(controls: dict[str, int]) -> re.Pattern[str]:
    """Matches control tokens, the longest first; matches nothing where there are none."""
    words = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")


def _starts(written: Sequence[str]) -> list[int]:
    starts, place = [], 0
    for text in written:
        starts.append(place)
        place += len(text)
    return starts


def _piece_at(starts: list[int], char: int, count: int) -> int:
    """The piece that holds a character; of empty pieces at the same place the last one, which is the one with text."""
    return min(max(bisect_right(starts, char) - 1, 0), count - 1)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
