"""Multi-head attention whose keys and values may come from elsewhere (Vaswani et al., arXiv:1706.03762).

Query transformers, resamplers and gated blocks are made of it. Heads need not fill the width: the
inner width of OpenFlamingo is 8 x 64 whatever surrounds it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError


class CrossAttention(nn.Module):
    """``x [B, T, D]`` looks at ``source [B, L, D_source]`` (None: at itself) through ``heads`` heads.

    ``head_dim`` None: the width divided by the heads. ``head_norm`` puts a layer norm over the queries and keys of
    each head. Raises ConfigError where ``heads`` does not divide ``dim`` and no ``head_dim`` is given.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        source_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        head_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ConfigError(f"width {dim} cannot be split into {heads} heads; choose heads that divide it")
        head_dim = head_dim or dim // heads
        inner, source_dim = heads * head_dim, source_dim or dim
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, inner, bias=bias)
        self.k = nn.Linear(source_dim, inner, bias=bias)
        self.v = nn.Linear(source_dim, inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)
        self.q_norm = nn.LayerNorm(head_dim) if head_norm else None
        self.k_norm = nn.LayerNorm(head_dim) if head_norm else None

    def forward(
        self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """``x [B, T, D]``, ``source [B, L, D_source]``, ``mask [B, 1, T or 1, L]`` (True: attend) → ``[B, T, D]``.

        ``values [B, L, D_source]``: what is fetched, where that is not what is compared (None: the source itself).
        """
        source = x if source is None else source
        q, k = self.compared(x, source)  # [B, H, T, Dh], [B, H, L, Dh]
        v = self._heads(self.v(source if values is None else values))  # [B, H, L, Dh]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # [B, H, T, Dh]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]

    def compared(self, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, T, Dh]`` and keys ``[B, H, L, Dh]``: the products of these say who looks where."""
        q, k = self._heads(self.q(x)), self._heads(self.k(x if source is None else source))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def without_effect(self) -> list[str]:
        """What the keys get last adds one number to all scores of a query, and softmax cancels it: its slope is 0."""
        if self.k_norm is not None:
            return ["k_norm.bias"]
        return ["k.bias"] if self.k.bias is not None else []

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, ., Dh]
