"""A perceptron on every token (LLaVA-1.5's ``mlp2x_gelu``, arXiv:2310.03744).

Reference: haotian-liu/LLaVA ``multimodal_projector``, c121f04. Layers are numbered as in its ``nn.Sequential``: linear
layers at 0, 2, 4. Initialised as ``nn.Linear`` is by default, as there.
Difference by design: the inner width is a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from chiasm.connectors.base import Connector, ConnectorConfig, only, sole
from chiasm.nn.mlp import Activation
from chiasm.registry import register
from chiasm.types import Condition, Count, Tokens


@register("connector", "mlp")
class MLP(Connector):
    """``depth`` linear layers with an activation between them."""

    class Config(ConnectorConfig):
        """``hidden`` is the width between the layers (None: the language model's, as in LLaVA)."""

        type: str = "mlp"
        depth: PositiveInt = 2
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "gelu"
        hidden: PositiveInt | None = None

        def count(self, source: Count | Mapping[str, Count]) -> Count:
            """As many as come in, on the same grid."""
            return only(source, "mlp")

    def __init__(self, config: Config, in_dims: Mapping[str, int], out_dim: int):
        super().__init__()
        self.config = config
        self.layers = perceptron(
            sole(in_dims, "mlp"), config.hidden or out_dim, out_dim, config.depth, config.activation
        )

    def forward(self, tokens: Tokens | Mapping[str, Tokens], cond: Condition | None = None) -> Tokens:
        """``x [U, N, D_in]`` → ``[U, N, D_out]``."""
        tokens = only(tokens, "mlp")
        return Tokens(self.layers(tokens.x), tokens.mask, tokens.grid)  # [U, N, D_out]


def perceptron(dim: int, hidden: int, out_dim: int, depth: int, activation: str, bias: bool = True) -> nn.Sequential:
    """``depth`` linear layers from ``dim`` over ``hidden`` to ``out_dim``; activations take the odd places."""
    widths = [dim, *[hidden] * (depth - 1), out_dim]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [Activation(activation), nn.Linear(a, b, bias=bias)]
    return nn.Sequential(*layers[1:])
