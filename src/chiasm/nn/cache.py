"""Keys and values of the positions a model has seen, in room that is taken once."""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm.errors import DataError


class KVCache:
    """Static room for ``capacity`` columns: keys and values ``[layers][B, H_kv, capacity, Dh]``.

    All rows append at one common column; what a row has no token for is padding (segment 0) there, so rows of unequal
    length sit side by side and each keeps its own ``positions``. A forward pass calls ``advance`` once, then ``append``
    in every layer.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch, heads, capacity, head_dim)
        # Zeros, not empty memory: a masked NaN would still poison the sum of values.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self._segments = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self._positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.capacity = capacity
        self.length = 0
        self._start = 0

    @property
    def batch(self) -> int:
        """Rows."""
        return self._segments.shape[0]

    @property
    def segments(self) -> Tensor:
        """``[B, length]``: 0 where a column holds padding."""
        return self._segments[:, : self.length]

    @property
    def positions(self) -> Tensor:
        """``[B, length]``."""
        return self._positions[:, : self.length]

    def advance(self, segments: Tensor, positions: Tensor) -> None:
        """Take the next ``T`` columns for ``segments``, ``positions`` ``[B, T]``. Raises DataError when full."""
        rows, t = segments.shape
        if rows != self.batch:
            raise DataError(f"the cache holds {self.batch} rows, {rows} were given: reorder it first or make a new one")
        if self.length + t > self.capacity:
            raise DataError(
                f"the cache has room for {self.capacity} positions; {self.length} are taken and {t} more were given: "
                "make it larger with new_cache(batch, capacity)"
            )
        self._start, self.length = self.length, self.length + t
        self._segments[:, self._start : self.length] = segments
        self._positions[:, self._start : self.length] = positions

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[B, H_kv, T, Dh]`` into the columns taken last; returns all so far, ``[B, H_kv, length, Dh]``."""
        place = slice(self._start, self.length)
        self.keys[layer][:, :, place] = keys
        self.values[layer][:, :, place] = values
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; ``rows [B']`` may repeat rows (beams) or leave some out."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self._segments = self._segments.index_select(0, rows)
        self._positions = self._positions.index_select(0, rows)
