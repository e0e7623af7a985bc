"""Tensors kept by a key, bounded in bytes: the longest unused go first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class Kept:
    """A dictionary of tensors that never holds more than ``limit`` bytes. One thread uses it."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.asked = self.found = 0
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def get(self, key: bytes) -> Tensor | None:
        """The tensor, which is now the last used; None where there is none."""
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
        return held

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a tensor, unless it alone is more than may be kept."""
        size = value.numel() * value.element_size()
        if key in self._held or size > self.limit:
            return
        self._held[key] = value
        self.bytes += size
        while self.bytes > self.limit:
            _, old = self._held.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self.bytes = 0


class Memory:
    """What calls of ``generate`` leave for each other: keys and values of beginnings, and vectors of pictures.

    Both are bounded in bytes. Their keys hold the state of every parameter, so changed weights meet nothing old.
    """

    def __init__(self, prefix_bytes: int = 1 << 28, feature_bytes: int = 1 << 27):
        self.prefixes, self.features = Kept(prefix_bytes), Kept(feature_bytes)


__all__ = ["Kept", "Memory"]
