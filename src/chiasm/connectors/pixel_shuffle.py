"""Neighbouring vectors joined into one, then projected: fewer, wider tokens (Idefics3, arXiv:2408.12637; SmolVLM).

Reference: ``Idefics3Connector.pixel_shuffle`` of transformers 5.23, whose order of channels is kept: the vectors of a
square of ``factor x factor`` come row by row, each with its whole width (``nn.PixelUnshuffle`` interleaves them).

Differences by design: grids need not be square; the projection has a bias only where ``bias`` says so (Idefics3: none);
weights start as ``nn.Linear`` does by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.connectors.mlp import perceptron
from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "pixel_shuffle")
class PixelShuffle(Connector):
    """Space to depth by ``factor``, then a perceptron of ``depth`` layers."""

    class Config(ConnectorConfig):
        """``depth=1`` is one linear layer; ``hidden`` as in ``mlp``."""

        type: str = "pixel_shuffle"
        factor: PositiveInt = 2
        depth: PositiveInt = 1
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "gelu"
        hidden: PositiveInt | None = None
        bias: bool = False

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """The grid divided by ``factor``. Raises ConfigError where it cannot be."""
            count = only(source, "pixel_shuffle")
            rows, columns = _checked(count.grid, count.tokens, self.factor)
            return Count(rows * columns // self.factor**2, (rows // self.factor, columns // self.factor))

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        wide = sole(in_dims, "pixel_shuffle") * config.factor**2
        self.layers = perceptron(wide, config.hidden or out_dim, out_dim, config.depth, config.activation, config.bias)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, rows·columns, D_in]`` → ``[U, rows·columns/factor², D_out]``."""
        tokens = only(tokens, "pixel_shuffle")
        if tokens.mask is not None:
            raise ConfigError("pixel_shuffle joins whole grids; its source gives masked tokens")
        factor = self.config.factor
        rows, columns = _checked(tokens.grid, tokens.x.shape[1], factor)
        x = space_to_depth(tokens.x, (rows, columns), factor)  # [U, rows*columns/factor², D_in*factor²]
        return Tokens(self.layers(x), grid=(rows // factor, columns // factor))  # [U, rows*columns/factor², D_out]


def space_to_depth(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """``x [U, rows·columns, D]`` → ``[U, rows·columns/factor², factor²·D]``, squares and their vectors row by row."""
    rows, columns = grid
    x = x.unflatten(1, (rows // factor, factor, columns // factor, factor))  # [U, rows/f, f, columns/f, f, D]
    return x.transpose(2, 3).flatten(3).flatten(1, 2)  # [U, rows*columns/factor², factor²*D]


def _checked(grid: tuple[int, int] | None, tokens: int, factor: int) -> tuple[int, int]:
    if grid is None:
        raise ConfigError(
            f"pixel_shuffle needs tokens that form a grid; these {tokens} do not (select='patch' gives one)"
        )
    if grid[0] % factor or grid[1] % factor:
        raise ConfigError(
            f"pixel_shuffle: a grid of {grid[0]}x{grid[1]} tokens cannot be divided by factor {factor}; "
            "choose another factor or picture size"
        )
    return grid
