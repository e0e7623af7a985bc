"""Pooling of a unit's token grid, as video models do before or after the projector."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F

from chiasm.config import Config
from chiasm.errors import ConfigError
from chiasm.types import Count, Tokens


class Pool(Config):
    """``average`` and ``max`` drop the rest of the division by ``stride``; ``bilinear`` rounds up (LLaVA-OneVision)."""

    mode: Literal["average", "max", "bilinear"] = "bilinear"
    stride: int = 2

    def count(self, unit: Count) -> Count:
        """The pooled grid and its number of tokens."""
        if unit.grid is None:
            raise ConfigError(f"pooling needs tokens that form a grid; these {unit.tokens} do not")
        rows, columns = unit.grid
        if self.mode == "bilinear":
            grid = (math.ceil(rows / self.stride), math.ceil(columns / self.stride))
        else:
            grid = (rows // self.stride, columns // self.stride)
        return Count(grid[0] * grid[1], grid)

    def apply(self, tokens: Tokens) -> Tokens:
        """``x [U, rows·columns, D]`` → ``x [U, rows'·columns', D]``."""
        pooled = self.count(Count(tokens.x.shape[1], tokens.grid))
        assert tokens.grid is not None and pooled.grid is not None
        x = tokens.x.transpose(1, 2).unflatten(2, tokens.grid)  # [U, D, rows, columns]
        if self.mode == "bilinear":
            x = F.interpolate(x, size=pooled.grid, mode="bilinear")  # [U, D, rows', columns']
        elif self.mode == "max":
            x = F.max_pool2d(x, self.stride)
        else:
            x = F.avg_pool2d(x, self.stride)
        return Tokens(x.flatten(2).transpose(1, 2), grid=pooled.grid)  # [U, rows'*columns', D]
