"""Multi-head self-attention, as encoders use it (Vaswani et al., arXiv:1706.03762)."""

from __future__ import annotations

from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.packed import linear
from chiasm.nn.scores import merged


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

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, asked: int | None = None) -> Tensor:
        """``x [B, N, D]``, ``mask [B, N]`` (True: may be attended to; not with ``causal``) → ``[B, N, D]``.

        ``asked`` (not with ``causal``): only so many first positions look, ``[B, asked, D]``.
        """
        q = linear(self.q, x[:, :asked])  # [B, N or asked, D]
        k, v = linear(self.k, x), linear(self.v, x)  # [B, N, D] each
        return linear(self.out, merged(q, k, v, self.heads, mask, causal))  # [B, N or asked, D]

    def without_effect(self) -> list[str]:
        """A bias of the keys adds one number to all scores of a query, and softmax cancels it: its slope is 0."""
        return ["k.bias"]
