"""Attention that is looked at while it runs: the shares that chosen queries give to every key."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from chiasm.nn.masks import Attend


@dataclass(frozen=True)
class Watching(Attend):
    """Does what ``Attend`` does, and keeps in ``seen`` how the queries ``rows [R]`` share their attention.

    ``visible [B, 1, R, L]`` is what these queries may attend to (True). Each entry of ``seen`` is ``[B, R, L]``, the
    mean over the heads, in float32.
    """

    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    visible: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v`` ``[B, H_kv, L, Dh]`` → ``[B, H, T, Dh]``."""
        self.seen.append(shares(q[:, :, self.rows], k, self.visible).mean(dim=1))
        return super().__call__(q, k, v)


def shares(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """``q [B, H, R, Dh]``, ``k [B, H_kv, L, Dh]`` → ``softmax(q kᵀ / √Dh)`` ``[B, H, R, L]`` in float32.

    ``visible`` broadcasts to ``[B, H, R, L]``; False is not attended to.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, L, Dh]
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [B, H, R, L]
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1)
