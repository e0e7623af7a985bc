"""Every few vectors that follow each other joined into one, then one linear layer: MiniGPT-v2's way to fewer tokens.

Paper: MiniGPT-v2 (arXiv:2310.09478). Reference: Vision-CAIR/MiniGPT-4 d94738a ``minigpt_v2.py`` and, for its Llama-2
form, ``minigpt4.py``. What is joined are ``factor`` patches of one row of the picture, from left to right: a strip, not
the square of ``pixel_shuffle``, so the weights of one fit the other in shape and in nothing else.

Differences by design: where rows of patches do not divide by ``factor``, a strip goes over the end of a row, as it does
in the reference; then the tokens form no grid.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import PositiveInt
from torch import nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "neighbours")
class Neighbours(Connector):
    """``factor`` vectors in reading order side by side, then one linear layer."""

    class Config(ConnectorConfig):
        """``factor``: how many vectors become one."""

        type: str = "neighbours"
        factor: PositiveInt = 4

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """A ``factor``-th. Raises ConfigError where the number of tokens does not divide."""
            count = only(source, "neighbours")
            return Count(_joined(count.tokens, self.factor), _grid(count.grid, self.factor))

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(sole(in_dims, "neighbours") * config.factor, out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, N/factor, D_out]``."""
        tokens = only(tokens, "neighbours")
        if tokens.mask is not None:
            raise ConfigError("neighbours joins all tokens of a picture; its source gives masked tokens")
        units, count, width = tokens.x.shape
        joined = _joined(count, self.config.factor)
        strips = tokens.x.reshape(units, joined, width * self.config.factor)  # [U, N/factor, D_in*factor]
        return Tokens(self.proj(strips), grid=_grid(tokens.grid, self.config.factor))  # [U, N/factor, D_out]


def _joined(tokens: int, factor: int) -> int:
    if tokens % factor:
        raise ConfigError(
            f"neighbours: {tokens} tokens cannot be joined by {factor}; leave the class vector out (select='patch'), "
            "or take a picture size that divides"
        )
    return tokens // factor


def _grid(grid: tuple[int, int] | None, factor: int) -> tuple[int, int] | None:
    return None if grid is None or grid[1] % factor else (grid[0], grid[1] // factor)
