"""Bottleneck adapters: a small perceptron after attention and after the perceptron of each block.

Paper: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., arXiv:1902.00751), figure 2.

    y = f(x) + up(activation(down(f(x))))        f: attention or perceptron, before its residual is added

Differences by design: ``up`` begins as zero instead of near zero, so the model begins exactly as it was; layer norms
are not trained along (a further row of the plan does that: ``"*norm*": train``).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.mlp import activation
from chiasm.registry import register
from chiasm.train.methods.base import Method, MethodConfig, ends, narrow, whole
from chiasm.types import Tokens

NAMES = ("attn", "self_attn", "attention", "mlp")  # what blocks call their two halves, in this package and in others


class AdapterConfig(MethodConfig):
    """``targets``: last steps of module names; None: the attention and the perceptron of every block covered."""

    type: str = "adapter"
    bottleneck: int = Field(default=64, gt=0)
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    targets: tuple[str, ...] | None = None


class Bottleneck(nn.Module):
    """Stands below the module that it follows and changes its output."""

    trained = ("down_weight", "down_bias", "up_weight", "up_bias")
    beside = True

    def __init__(self, method: AdapterConfig, like: Tensor, dim: int):
        super().__init__()
        self.method = method
        self.activation = activation(method.activation)
        down = torch.empty(method.bottleneck, dim)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down_weight = nn.Parameter(down.to(like.device, like.dtype))
        self.down_bias = nn.Parameter(like.new_zeros(method.bottleneck))
        self.up_weight = nn.Parameter(like.new_zeros(dim, method.bottleneck))
        self.up_bias = nn.Parameter(like.new_zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D]`` → ``[..., D]``."""
        hidden = self.activation(F.linear(x, self.down_weight, self.down_bias))  # [..., bottleneck]
        return x + F.linear(hidden, self.up_weight, self.up_bias)

    def follow(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The hook after the module: its first output is changed, whatever else it gives is not."""
        if isinstance(output, Tokens):
            return Tokens(self(output.x), output.mask, output.grid)
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


@register("method", "adapter")
class Adapter(Method):
    """A bottleneck after each attention and each perceptron."""

    Config = AdapterConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract."""
        inside = [name for name, _ in model.named_modules() if name and whole(model, name, parameters)]
        if self.config.targets is not None:
            return narrow(inside, self.config.targets, self.config.label())
        found = [name for name in inside if any(ends(name, half) for half in NAMES)]
        found = [name for name in found if not any(name.startswith(other + ".") for other in found)]
        if not found:
            raise ConfigError(
                f"{self.config.label()} finds 0 blocks among {len(parameters)} parameters (halves called "
                f"{', '.join(NAMES)}); name modules with targets=[...]"
            )
        return found

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        module = model.get_submodule(name)
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ConfigError(f"{self.config.label()}: {name} holds no linear layer, so its width is not known")
        adapter = Bottleneck(self.config, linear[-1].weight, linear[-1].out_features)
        module.add_module("adapter", adapter)
        module.register_forward_hook(adapter.follow)
