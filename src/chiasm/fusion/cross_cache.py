"""What an answer keeps of its media: keys and values of every gated block, computed once, beside the text's own cache.

The media of a row stand in ``L`` columns of their own. New text, with or without new media, can follow at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from chiasm.fusion.gated import KeysValues


class CrossCache:
    """``text`` is the language model's cache; ``kept[i]`` the keys and values ``[B, H, L, Dh]`` of block ``i``.

    ``times [B, L]`` is the number of each vector's medium in its row (from 1; 0: padding), ``of [B, L]`` its segment,
    ``seen [B]`` the number of media so far.
    """

    def __init__(self, text: Any, blocks: int, batch: int, device: torch.device):
        self.text = text
        self.kept: list[KeysValues] = []
        self.blocks = blocks
        self.times = torch.zeros(batch, 0, dtype=torch.long, device=device)  # [B, L]
        self.of = torch.zeros(batch, 0, dtype=torch.long, device=device)  # [B, L]
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)  # [B]

    def add(self, x: Tensor, media: Any, blocks: Iterable[Any]) -> Tensor:
        """Keep the media that come with ``x [B, T, D]``; returns the media up to each position ``[B, T]``."""
        if media is None:
            return self.seen.unsqueeze(1).expand(-1, x.shape[1])  # [B, T]
        fresh = [block.keys_values(media.x) for block in blocks]
        self.kept = [_joined(old, new) for old, new in zip(self.kept, fresh, strict=True)] if self.kept else fresh
        before = self.seen.unsqueeze(1)  # [B, 1]
        times = torch.where(media.times > 0, media.times + before, media.times)
        self.times, self.of = torch.cat((self.times, times), dim=1), torch.cat((self.of, media.segments), dim=1)
        marks = media.marks + before  # [B, T]
        self.seen = marks[:, -1]
        return marks

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; ``rows [B']`` may repeat rows (beams) or leave some out."""
        self.text.reorder(rows)
        self.kept = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.kept]
        self.times, self.of, self.seen = (t.index_select(0, rows) for t in (self.times, self.of, self.seen))

    def __getattr__(self, name: str) -> Any:
        """Length, capacity, segments and positions are those of the text."""
        if name in ("length", "capacity", "segments", "positions", "batch"):
            return getattr(self.text, name)
        raise AttributeError(name)


def _joined(old: KeysValues, new: KeysValues) -> KeysValues:
    return torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2)  # [B, H, L, Dh]
