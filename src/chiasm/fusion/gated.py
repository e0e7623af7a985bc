"""A gated block: hidden states look at media, then go through a perceptron, each added through a gate that starts shut.

Papers: Flamingo (arXiv:2204.14198); OpenFlamingo (arXiv:2308.01390); Idefics (arXiv:2306.16527). Reference:
open_flamingo 655f693 ``GatedCrossAttentionBlock``; ``IdeficsGatedCrossAttentionLayer`` of transformers 5.23, equal to
1e-5.

    x += tanh(attn_gate) · attention(norm(x), media)      # exactly 0 where a position sees no medium
    x += tanh(mlp_gate) · mlp(norm(x))

Differences by design: what differs between the three systems is configuration. Weights start as a normal of deviation
0.02. Keys and values of media can be computed once (``keys_values``) and handed in instead of the media.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from chiasm.config import Config
from chiasm.errors import ConfigError
from chiasm.nn.mlp import activation, gated
from chiasm.nn.norm import RMSNorm

KeysValues = tuple[Tensor, Tensor]  # each [B, H, L, Dh]


class BlockConfig(Config):
    """The sizes and kinds of a gated block.

    ``head_dim`` None: the language model's width divided by ``heads``. ``mlp`` None: four times that width;
    ``gated_mlp`` gives Llama's perceptron. ``head_norm`` puts a norm of the block's kind over the queries and keys of
    each head. ``gate``: one number for all channels, or one for each; ``gate_start`` is what they start at, before the
    tanh. ``silent``: what a position that sees no medium leaves out, the attention alone (published) or the block.
    """

    heads: PositiveInt = 8
    head_dim: PositiveInt | None = 64
    mlp: PositiveInt | None = None
    gated_mlp: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "squared_relu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    head_norm: bool = False
    gate: Literal["scalar", "vector"] = "scalar"
    gate_start: float = 0.0
    silent: Literal["attention", "block"] = "attention"


@dataclass(frozen=True)
class Sight:
    """Which media positions see: ``mask [B, 1, T, L]`` (True: attend), ``blind [B, T, 1]`` (True: sees none).

    The rows of blind positions are True throughout, so that none is empty; their result is set to 0.
    """

    mask: Tensor
    blind: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> Sight:
        """From ``seen [B, T, L]`` with rows that may be empty."""
        blind = ~seen.any(dim=-1, keepdim=True)  # [B, T, 1]
        return cls((seen | blind).unsqueeze(1), blind)


class GatedBlock(nn.Module):
    """Cross-attention and a perceptron, each behind its gate. Only layer norms have biases."""

    def __init__(self, config: BlockConfig, dim: int, media_dim: int):
        super().__init__()
        c = self.config = config
        if c.head_dim is None and dim % c.heads:
            raise ConfigError(f"gated block: width {dim} cannot be split into {c.heads} heads; give head_dim")
        self.head_dim = c.head_dim or dim // c.heads
        inner = c.heads * self.head_dim
        self.attn_norm = norm(c, dim)
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(media_dim, inner, bias=False)
        self.v = nn.Linear(media_dim, inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.q_norm = norm(c, self.head_dim) if c.head_norm else None
        self.k_norm = norm(c, self.head_dim) if c.head_norm else None
        self.mlp_norm = norm(c, dim)
        self.mlp = Perceptron(c, dim)
        width = dim if c.gate == "vector" else 1
        self.attn_gate = nn.Parameter(torch.full((width,), c.gate_start))
        self.mlp_gate = nn.Parameter(torch.full((width,), c.gate_start))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, media: Tensor | KeysValues, sight: Sight) -> Tensor:
        """``x [B, T, D]``, ``media [B, L, D_media]`` or its keys and values → ``[B, T, D]``."""
        k, v = self.keys_values(media) if isinstance(media, Tensor) else media  # [B, H, L, Dh]
        q = self.queries(x)  # [B, H, T, Dh]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask)  # [B, H, T, Dh]
        found = self.out(mixed.transpose(1, 2).flatten(2)).masked_fill(sight.blind, 0)  # [B, T, D]
        x = x + self.attn_gate.tanh() * found
        inner = self.mlp(self.mlp_norm(x))  # [B, T, D]
        if self.config.silent == "block":
            inner = inner.masked_fill(sight.blind, 0)
        return x + self.mlp_gate.tanh() * inner

    def queries(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` → what is compared with the keys ``[B, H, T, Dh]``."""
        q = self._heads(self.q(self.attn_norm(x)))  # [B, H, T, Dh]
        return q if self.q_norm is None else self.q_norm(q)

    def keys_values(self, media: Tensor) -> KeysValues:
        """``media [B, L, D_media]`` → keys and values ``[B, H, L, Dh]``: what a cache keeps."""
        k = self._heads(self.k(media))  # [B, H, L, Dh]
        return k if self.k_norm is None else self.k_norm(k), self._heads(self.v(media))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, ., Dh]


class Perceptron(nn.Module):
    """``fc2(activation(fc1(x)))``, or Llama's ``down(activation(gate(x)) · up(x))``; no biases."""

    def __init__(self, config: BlockConfig, dim: int):
        super().__init__()
        hidden = config.mlp or 4 * dim
        self.gate = nn.Linear(dim, hidden, bias=False) if config.gated_mlp else None
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.squares = config.activation == "squared_relu"
        self.function = activation("relu" if self.squares else config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` → ``[B, T, D]``."""
        if self.gate is not None:
            return self.fc2(gated(self.gate(x), self.fc1(x), self.function))
        inner = self.function(self.fc1(x))  # [B, T, H]
        return self.fc2(inner.square() if self.squares else inner)


def norm(config: BlockConfig, dim: int) -> nn.Module:
    """A norm of the block's kind over ``dim`` channels."""
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(dim, eps=config.norm_eps)
