"""One linear layer (LLaVA-1.0, arXiv:2304.08485; reference: haotian-liu/LLaVA ``multimodal_projector``, c121f04).

Initialised as ``nn.Linear`` is by default (uniform, bound 1/√D_in), which is what LLaVA trains from; the port in
transformers starts from a normal of deviation 0.02.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "linear")
class Linear(Connector):
    """``x W + b`` on every token by itself."""

    class Config(ConnectorConfig):
        """No options."""

        type: str = "linear"

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as come in, on the same grid."""
            return only(source, "linear")

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(sole(in_dims, "linear"), out_dim)

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, N, D_out]``."""
        tokens = only(tokens, "linear")
        return Tokens(self.proj(tokens.x), tokens.mask, tokens.grid)  # [U, N, D_out]
