"""Tokens alone, for those who look at probabilities: the text of each, and the bytes it stands for."""

from __future__ import annotations

import re
from typing import Any


class Words:
    """``words(id)`` → text (with U+FFFD where it is no whole character) and bytes."""

    def __init__(self, processor: Any):
        self._decode = processor.decode
        self._tokenizer = getattr(processor, "tokenizer", None)
        known = getattr(self._tokenizer, "id_of", lambda token: None)
        self._table = byte_characters() if known("Ġ") is not None else None
        self._held: dict[int, tuple[str, bytes]] = {}

    def __call__(self, index: int) -> tuple[str, bytes]:
        """Text and bytes of a token."""
        if index not in self._held:
            data = self._bytes(index)
            self._held[index] = (data.decode("utf-8", errors="replace"), data)
        return self._held[index]

    def _bytes(self, index: int) -> bytes:
        token = None if self._tokenizer is None else self._tokenizer.token_of(index)
        if token is None or index in getattr(self._tokenizer, "specials", {}).values():
            return (token or self._decode([index])).encode()
        if self._table is not None and all(character in self._table for character in token):
            return bytes(self._table[character] for character in token)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers (GPT-2's) write bytes with."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


__all__ = ["Words"]
