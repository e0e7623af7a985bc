"""An elastic number of tokens: queries in order of importance, of which as many are used as one can afford.

Paper: Matryoshka Query Transformer (MQT-LLaVA, arXiv:2405.19315). Reference: gordonhu608/MQT-LLaVA
``multimodal_projector/builder.py`` 92c35d0. One attention over the picture from the first ``use`` of ``queries``
learned vectors, then one matrix to the language model's width. Queries do not see each other, so the first ``use``
outputs are the same whatever ``use`` is: one set of weights serves every number
(``config.edit(**{"model.connectors.image.use": 36})``).

Differences by design: keys hold the picture and its positions. The reference builds keys from the positions alone, so
where its queries look does not depend on the picture; ``keys="positions"`` gives that, for its weights. Positions are
computed for the grid of the picture; the reference resamples a stored 16 x 16 table in half precision (equal at that
grid; ``positions="resampled"`` does the same in float32).

Left to the recipe: the paper draws ``use`` anew for every step of its second stage (even numbers from 2 to 256). Here
a picture's tokens are counted before the model runs, so that drawing belongs to whoever renders the batch; a stage
with ``use`` fixed is what this connector does by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.positions import interpolate, sincos
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "mqt")
class MQT(Connector):
    """The first ``use`` of ``queries`` look at the picture once."""

    class Config(ConnectorConfig):
        """``use`` None: all of them. ``queries`` is a square: they have positions of their own, as the patches do."""

        type: str = "mqt"
        queries: PositiveInt = 256
        use: PositiveInt | None = None
        heads: PositiveInt = 16
        keys: Literal["content", "positions"] = "content"
        positions: Literal["computed", "resampled"] = "computed"

        @model_validator(mode="after")
        def _fits(self) -> MQT.Config:
            if self.side**2 != self.queries:
                raise ConfigError(f"mqt: {self.queries} queries form no square; {self.side**2} would")
            if self.use is not None and self.use > self.queries:
                raise ConfigError(f"mqt: use={self.use} is more than its {self.queries} queries")
            return self

        @property
        def side(self) -> int:
            """The side of the square that the queries form."""
            return round(math.sqrt(self.queries))

        @property
        def used(self) -> int:
            """How many queries run."""
            return self.use or self.queries

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as are used. Raises ConfigError where the picture's tokens form no grid."""
            _grid(only(source, "mqt").grid, only(source, "mqt").tokens)
            return Count(self.used)

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config, self.dim = config, sole(in_dims, "mqt")
        if self.dim % 4:
            raise ConfigError(f"mqt: its positions need an encoder's width divisible by 4, got {self.dim}")
        self.queries = nn.Parameter(torch.empty(config.queries, self.dim))
        self.attn = CrossAttention(self.dim, config.heads)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(self.dim, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(self.dim, out_dim) / out_dim**0.5)
        nn.init.trunc_normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, rows·columns, D_in]`` → ``[U, use, D_out]``."""
        tokens = only(tokens, "mqt")
        x, used = tokens.x, self.config.used
        square = (self.config.side, self.config.side)
        home = sincos(self.dim, square, x.device)  # [queries, D_in]
        queries = self.queries[:used] + home[:used].to(x.dtype)  # [use, D_in]
        places = self._places(_grid(tokens.grid, x.shape[1]), home).to(x.dtype)  # [N, D_in]
        keys = places.expand_as(x) if self.config.keys == "positions" else x + places  # [U, N, D_in]
        mask = None if tokens.mask is None else tokens.mask[:, None, None]  # [U, 1, 1, N]
        asked = self.query_norm(queries).expand(len(x), -1, -1)  # [U, use, D_in]
        looked = self.attn(asked, self.key_norm(keys), mask, values=self.value_norm(x))  # [U, use, D_in]
        return Tokens(looked @ self.proj)  # [U, use, D_out]

    def _places(self, grid: tuple[int, int], home: Tensor) -> Tensor:
        if self.config.positions == "resampled":
            return interpolate(home, (self.config.side, self.config.side), grid)  # [N, D_in]
        return sincos(self.dim, grid, home.device)  # [N, D_in]


def _grid(grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    if grid is None:
        raise ConfigError(f"mqt needs tokens that form a grid; these {tokens} do not (select='patch' gives one)")
    return grid
