"""The language-model contract: vectors and positions in, hidden states out; the head runs only where asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.config import PartConfig

Cross = Mapping[int, Callable[[Tensor], Tensor]]


class LMConfig(PartConfig):
    """What a language model is built from."""


class LM(nn.Module):
    """A causal language model read through its embeddings.

    ``segments [B, T]`` says which conversation a position belongs to (0: padding); a position attends to the earlier
    positions of its own segment. ``positions [B, T]`` are counted inside the segment. ``cache`` holds the keys and
    values of what came before. ``cross[i]`` maps the hidden states ``[B, T, D]`` before layer ``i``, or after the last
    where ``i`` is ``depth`` (gated cross-attention). Encoder-decoder models set ``encoder_decoder`` and implement
    ``encode`` and ``decode`` instead.
    """

    Config: type[LMConfig] = LMConfig
    dim: int
    vocab: int
    max_positions: int | None = None  # None: no limit
    depth = 0  # layers that ``cross`` can stand before; 0: it takes none
    extra = 0  # columns that a row takes in the cache beside its own: a learned prompt's
    recompute = False  # training: each block's inner states are computed again on the way back, not kept
    encoder_decoder = False
    start_id: int | None = None  # encoder-decoder only: the id a decoder begins with

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` → ``[B, T, D]``."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, cache: Any = None, cross: Cross | None = None
    ) -> Tensor:
        """``x [B, T, D]``, ``positions``, ``segments`` ``[B, T]`` → hidden states ``[B, T, D]`` after the last norm."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """``hidden [..., D]`` → logits ``[..., V]``."""
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Room for ``capacity`` positions of ``batch`` rows."""
        raise NotImplementedError

    def steady(self, shortest: int, longest: int) -> bool:
        """Whether a cache filled at ``shortest`` positions still holds at ``longest``: frequencies may change."""
        return True

    def shares(
        self, x: Tensor, positions: Tensor, segments: Tensor, rows: Tensor, last: int | None = None
    ) -> Tensor | None:
        """How the positions ``rows [R]`` share their attention: ``[B, R, T]``, mean over heads and the ``last`` layers.

        ``last`` None: the upper half. None is returned by a model that does not tell.
        """
        return None

    def encode(self, x: Tensor, segments: Tensor) -> Tensor:
        """Encoder-decoder only: ``x [B, T, D]`` → memory ``[B, T, D]``."""
        raise NotImplementedError

    def decode(self, ids: Tensor, memory: Tensor, segments: Tensor, cache: Any = None) -> Tensor:
        """Encoder-decoder only: decoder ids ``[B, S]``, memory ``[B, T, D]`` → hidden ``[B, S, D]``."""
        raise NotImplementedError
