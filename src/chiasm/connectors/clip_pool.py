"""CLIP's attention pooling of a residual network's map: the mean place asks all places, itself included.

Paper: CLIP (arXiv:2103.00020, section 2.4). Reference: ``AttentionPool2d`` of openai/CLIP d05afc4.

Differences by design: a map of another size than ``grid`` gets interpolated positions. Initialisation as there:
positions and the four matrices are normal of deviation ``D_in^-0.5``, biases 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveInt
from torch import nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError
from chiasm.nn.positions import interpolate
from chiasm.nn.scores import attention
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "clip_pool")
class ClipPool(Connector):
    """``x [U, rows·columns, D_in]`` → ``[U, 1, D_out]``."""

    class Config(ConnectorConfig):
        """``grid``: rows and columns of the map that the positions are for; ``heads`` of the attention."""

        type: str = "clip_pool"
        grid: tuple[PositiveInt, PositiveInt] = (7, 7)
        heads: PositiveInt = 32

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """One."""
            return Count(1)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        dim = sole(in_dims, "clip_pool")
        if dim % config.heads:
            raise ConfigError(f"clip_pool: width {dim} cannot be split into {config.heads} heads")
        self.positions = nn.Parameter(torch.empty(config.grid[0] * config.grid[1] + 1, dim))
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, out_dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=dim**-0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, rows·columns, D_in]`` → ``[U, 1, D_out]``. Raises ConfigError where the tokens form no grid."""
        tokens = only(tokens, "clip_pool")
        if tokens.grid is None:
            raise ConfigError("clip_pool reads a map, but its encoder gives no grid; read the tower's patches")
        x = torch.cat((tokens.x.mean(1, keepdim=True), tokens.x), dim=1)  # [U, 1 + rows*columns, D_in]
        x = x + interpolate(self.positions, self.config.grid, tokens.grid, prefix=1).to(x.dtype)
        split = (-1, self.config.heads, x.shape[2] // self.config.heads)
        q = self.q(x[:, :1]).view(len(x), *split).transpose(1, 2)  # [U, H, 1, Dh]
        k, v = (layer(x).view(len(x), *split).transpose(1, 2) for layer in (self.k, self.v))  # [U, H, N, Dh]
        mixed = attention(q, k, v)  # [U, H, 1, Dh]
        return Tokens(self.out(mixed.transpose(1, 2).flatten(2)))  # [U, 1, D_out]
