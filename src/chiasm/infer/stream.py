"""Tokens to text while they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet


class TextStream:
    """Turns ids into pieces of text. The pieces of one stream, joined, are its text.

    Only the ids since the last but one finished piece are decoded again, since a tokenizer may write a token
    differently at the beginning of a text (SentencePiece drops the space there).
    """

    def __init__(self, decode: Decode):
        self.decode = decode
        self.ids: list[int] = []
        self._window = 0  # ids before it are never decoded again
        self._read = 0  # ids before it have been given out

    def push(self, token: int) -> str:
        """The text that ``token`` completes: empty while a character is unfinished."""
        self.ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._window, self._read = self._read, len(self.ids)
        return piece

    def flush(self) -> str:
        """What is left at the end, unfinished characters as the decoder writes them."""
        piece = self._piece()
        self._window = self._read = len(self.ids)
        return piece

    def _piece(self) -> str:
        before = self.decode(self.ids[self._window : self._read]) if self._read > self._window else ""
        return self.decode(self.ids[self._window :])[len(before) :]


def marking(decode: Decode, marks: Sequence[str], ids: Sequence[int]) -> Decode:
    """``decode`` that writes token ``ids[i]`` as ``marks[i]``, a character that no other token writes."""
    shown = dict(zip(ids, marks, strict=True))
    forged = str.maketrans(dict.fromkeys(marks, UNFINISHED))

    def write(tokens: list[int]) -> str:
        found: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in shown:
                found += [decode(run).translate(forged), shown[token]]
                run = []
            else:
                run.append(token)
        return "".join([*found, decode(run).translate(forged)])

    return write


class StopStrings:
    """Passes text on until one of ``stops`` appears; holds back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now sure to come before any stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        held = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
