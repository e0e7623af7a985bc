"""LoRA: a linear layer's change as the product of two thin matrices.

Paper: LoRA (arXiv:2106.09685). Reference: ``peft`` 0.21, whose files are read and written (``chiasm.convert.peft``).

    y = W x + b + (alpha / r) · B A dropout(x)        A [r, in], B [out, r]

Differences by design: the base weight keeps its name and its place, the two matrices stand beside it. ``B`` begins as
zero, so the model begins as it was, and ``A`` gets its first gradient at the second step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.train.methods.base import Method, MethodConfig, narrow, owners, replace


class LoRAConfig(MethodConfig):
    """``targets``: last steps of module names; None: all linear layers that the pattern covers but ``lm_head``."""

    type: str = "lora"
    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank change. ``weight`` and ``bias`` are those of the layer it takes the place of."""

    trained = ("lora_a", "lora_b")
    beside = False

    def __init__(self, base: nn.Linear, method: LoRAConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.method = method
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = thin(base, method.r)

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.method.alpha / self.method.r

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""
        return F.linear(input, self.weight, self.bias) + low_rank(self, input)  # [..., out]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same in eval mode."""
        return plain(self, self.weight + change(self))

    def extra_repr(self) -> str:
        """For printing."""
        return f"{super().extra_repr()}, {self.method.label()}"


def thin(base: nn.Linear, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """``A [r, in]`` as a linear layer begins (uniform, Kaiming with a = √5), ``B [out, r]`` zero."""
    a = torch.empty(r, base.in_features, dtype=torch.float32)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    like = base.weight
    return nn.Parameter(a.to(like.device, like.dtype)), nn.Parameter(like.new_zeros(base.out_features, r))


def low_rank(layer: Any, x: Tensor) -> Tensor:
    """``x [..., in]`` → its low-rank change ``[..., out]``."""
    x = F.dropout(x, layer.method.dropout, layer.training)
    return F.linear(F.linear(x, layer.lora_a) * layer.scale, layer.lora_b)  # [..., r], [..., out]


def change(layer: Any) -> Tensor:
    """The change of the weight ``[out, in]``, in the type of ``B``; the product is made in float32 at least."""
    wide = torch.promote_types(layer.lora_b.dtype, torch.float32)
    return (layer.scale * (layer.lora_b.to(wide) @ layer.lora_a.to(wide))).to(layer.lora_b.dtype)


def plain(layer: Any, weight: Tensor) -> nn.Linear:
    """A linear layer of this weight, with the layer's own bias and mode."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return linear.train(layer.training)


def linear_layers(model: nn.Module, parameters: set[str], config: Any) -> list[str]:
    """The linear layers among the owners of ``parameters`` that ``config`` means. Raises ConfigError.

    Left out are the layers inside torch's own attention, which reads their weights without calling them.
    """
    fused = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    found = []
    within = owners(parameters)
    for name, module in model.named_modules():
        inside = name.rpartition(".")[0] in fused
        if name in within and isinstance(module, nn.Linear) and f"{name}.weight" in parameters and not inside:
            found.append(name)
    if config.targets is not None:
        return narrow(found, config.targets, config.label())
    found = [name for name in found if name.rpartition(".")[2] != "lm_head"]
    if not found:
        raise ConfigError(
            f"{config.label()} finds 0 linear layers among {len(parameters)} parameters; give it a pattern that "
            "covers some"
        )
    return found


@register("method", "lora")
class LoRA(Method):
    """Two thin matrices beside each linear layer."""

    Config = LoRAConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract."""
        return linear_layers(model, parameters, self.config)

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        base = model.get_submodule(name)
        if type(base).forward is not nn.Linear.forward:
            raise ConfigError(f"{name} is a {type(base).__name__}: LoRA changes plain linear layers only")
        replace(model, name, LoRALinear(base, self.config))  # type: ignore[arg-type]
