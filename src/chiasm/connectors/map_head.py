"""SigLIP's pooling head: a learned probe attends to all patches, then a perceptron (multi-head attention pooling).

Papers: Set Transformer (arXiv:1810.00825), SigLIP (arXiv:2303.15343). Reference:
``SiglipMultiheadAttentionPoolingHead`` of transformers 5.23, equal to 1e-5 in float32.

Differences by design: none. Initialisation, as in big_vision: Xavier-uniform matrices, perceptron biases of deviation
1e-6, other biases 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.mlp import MLP
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "map_head")
class MapHead(Connector):
    """``probe`` looks at ``x [U, N, D]``; then ``y + mlp(norm(y))``: ``[U, 1, D]``."""

    class Config(ConnectorConfig):
        """``heads`` of the attention and width of the perceptron: those of the tower's blocks."""

        type: str = "map_head"
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu_tanh"
        norm_eps: float = 1e-6

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """One."""
            return Count(1)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        dim = sole(in_dims, "map_head")
        if dim != out_dim:
            raise ConfigError(
                f"connector 'map_head' keeps the width, {dim}, but {out_dim} is wanted; make the two equal "
                f"(dim={dim} in a dual_tower), or take a connector that maps widths"
            )
        self.probe = nn.Parameter(torch.empty(dim))
        self.attn = CrossAttention(dim, config.heads)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, config.mlp, config.activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, as the head of this file says."""
        nn.init.xavier_uniform_(self.probe.unsqueeze(0))
        for name, parameter in [*self.attn.named_parameters(), *self.mlp.named_parameters()]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.startswith("fc"):
                nn.init.normal_(parameter, std=1e-6)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D]`` → ``[U, 1, D]``."""
        tokens = only(tokens, "map_head")
        probe = self.probe.expand(len(tokens.x), 1, -1)  # [U, 1, D]
        mask = None if tokens.mask is None else tokens.mask[:, None, None, :]  # [U, 1, 1, N]
        y = self.attn(probe, tokens.x, mask)  # [U, 1, D]
        return Tokens(y + self.mlp(self.norm(y)))  # [U, 1, D]
