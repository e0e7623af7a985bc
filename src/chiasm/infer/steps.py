"""One batch of prompts, token by token: what the model computes, whoever chooses the tokens.

``Cached`` is the usual way. ``Afresh`` runs the whole sequence for each token: for comparison, and where a cache
would not hold because rotary frequencies change with the length. ``Written`` is for encoder-decoder models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.base import Fusion
from chiasm.types import Batch


class Steps:
    """Rows of a batch that write. ``logits [R, V]`` are those of the next token, float32."""

    logits: Tensor

    def advance(self, ids: Tensor) -> None:
        """Append ``ids [R]``; ``logits`` are then those after them."""
        raise NotImplementedError

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what ``rows[i]`` was; ``rows [R']`` may repeat rows (beams) or leave finished ones out."""
        raise NotImplementedError


class Cached(Steps):
    """Prefill once, then one position at a time over cached keys and values."""

    def __init__(self, model: Fusion, batch: Batch, new_tokens: int):
        self.model = model
        rows, columns = batch.input_ids.shape
        self.cache = model.new_cache(rows, columns + new_tokens)
        output = model(batch, logits="last", cache=self.cache)
        assert output.logits is not None
        self.logits = output.logits.float()  # [B, V]
        self.positions = (batch.segment_ids != 0).sum(dim=1, keepdim=True)  # [B, 1]
        self.segments = batch.segment_ids.amax(dim=1, keepdim=True)  # [B, 1]

    def advance(self, ids: Tensor) -> None:
        """Append ``ids [R]``."""
        self.logits = self.model.step(ids.unsqueeze(1), self.positions, self.segments, self.cache).float()  # [R, V]
        self.positions = self.positions + 1

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what ``rows[i]`` was."""
        self.cache.reorder(rows)
        self.logits, self.positions, self.segments = (t[rows] for t in (self.logits, self.positions, self.segments))


class Afresh(Steps):
    """The whole sequence for each token. Media are encoded once."""

    def __init__(self, model: Any, batch: Batch, new_tokens: int):
        if not hasattr(model, "splice"):
            raise ConfigError(f"{type(model).__name__} cannot write without a cache: leave use_cache as it is")
        self.model = model
        self.x = model.splice(batch, {})  # [B, T, D]
        self.media = model.media(batch, self.x, {})  # what stands beside the sequence, or None
        self.positions, self.segments = batch.positions, batch.segment_ids  # each [B, T]
        self.next = (batch.segment_ids != 0).sum(dim=1, keepdim=True)  # [B, 1]
        self._run()

    def advance(self, ids: Tensor) -> None:
        """Append ``ids [R]``."""
        self.x = torch.cat((self.x, self.model.lm.embed(ids.unsqueeze(1))), dim=1)  # [R, T+1, D]
        self.positions = torch.cat((self.positions, self.next), dim=1)
        self.segments = torch.cat((self.segments, self.segments.amax(dim=1, keepdim=True)), dim=1)
        self.next = self.next + 1
        self._run()

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what ``rows[i]`` was."""
        names = ("logits", "x", "positions", "segments", "next")
        self.logits, self.x, self.positions, self.segments, self.next = (getattr(self, name)[rows] for name in names)
        self.media = self.media if self.media is None else self.media.reorder(rows)

    def _run(self) -> None:
        hidden = self.model.states(self.x, self.positions, self.segments, self.media)  # [R, T, D]
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        last = ((self.segments != 0) * columns).argmax(dim=1)  # [R]
        self.logits = self.model.lm.head(
            hidden[torch.arange(len(hidden), device=hidden.device), last]
        ).float()  # [R, V]


class Written(Steps):
    """Encoder-decoder: the prompt is encoded once, the decoder begins with the model's start id."""

    def __init__(self, model: Any, batch: Batch, new_tokens: int, use_cache: bool = True):
        self.lm, self.segments = model.lm, batch.segment_ids
        if self.lm.start_id is None:
            raise ConfigError("this encoder-decoder model names no decoder_start_token_id: give it in the lm's config")
        self.memory = self.lm.encode(model.splice(batch, {}), batch.segment_ids)  # [B, T, D]
        rows, memory = len(self.memory), self.memory
        self.cache = self.lm.new_cache(rows, new_tokens + 1, memory.device, memory.dtype) if use_cache else None
        self.ids = batch.input_ids.new_full((rows, 1), self.lm.start_id)  # [B, 1]
        self._run(self.ids)

    def advance(self, ids: Tensor) -> None:
        """Append ``ids [R]``."""
        self.ids = torch.cat((self.ids, ids.unsqueeze(1)), dim=1)  # [R, S]
        self._run(self.ids if self.cache is None else ids.unsqueeze(1))

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what ``rows[i]`` was."""
        if self.cache is not None:
            self.cache.reorder(rows)
        names = ("logits", "memory", "segments", "ids")
        self.logits, self.memory, self.segments, self.ids = (getattr(self, name)[rows] for name in names)

    def _run(self, ids: Tensor) -> None:
        hidden = self.lm.decode(ids, self.memory, self.segments, cache=self.cache)  # [R, S, D]
        self.logits = self.lm.head(hidden[:, -1]).float()  # [R, V]
