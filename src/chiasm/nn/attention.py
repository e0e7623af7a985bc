"""Multi-head self-attention, as encoders use it (Vaswani et al., arXiv:1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.scores import attention


class Attention(nn.Module):
    """Every position attends to every other one, or to those up to itself. Four linear layers with bias.

    They are called ``q``, ``k``, ``v`` and ``out``.

    Raises ConfigError where ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ConfigError(f"width {dim} cannot be split into {heads} heads; choose heads that divide it")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``x [B, N, D]``, ``mask [B, N]`` (True: may be attended to; not with ``causal``) → ``[B, N, D]``."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        allowed = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, N]
        if allowed is None:
            mixed = attention(q, k, v, causal)  # [B, H, N, D/H]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B, H, N, D/H]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, N, D]
