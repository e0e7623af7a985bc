"""QLoRA: LoRA beside linear layers whose own weights are kept in 4 bits.

Paper: QLoRA (arXiv:2305.14314). Reference: ``peft`` over ``bitsandbytes``; its paged optimizer is left out.

Differences by design: the weight is made from its codes for each product and again for the gradient, so nothing of its
full size is kept between them; this is torch throughout and runs on the CPU as on an accelerator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.registry import register
from chiasm.train.methods.base import Method, replace
from chiasm.train.methods.fingerprint import mark
from chiasm.train.methods.lora import LoRAConfig, change, linear_layers, low_rank, plain, thin
from chiasm.train.methods.nf4 import NF4, dequantise, quantise


class QLoRAConfig(LoRAConfig):
    """LoRA's options, and ``double``: the scales of the 4-bit blocks in 8 bits."""

    quantises = True

    type: str = "qlora"
    double: bool = True


class QLoRALinear(nn.Module):
    """A linear layer with a 4-bit weight and a low-rank change."""

    trained = ("lora_a", "lora_b")
    beside = False

    def __init__(self, base: nn.Linear, method: QLoRAConfig):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.method = method
        self.shape, self.kind = base.weight.shape, base.weight.dtype
        self.bias = base.bias
        self.lora_a, self.lora_b = thin(base, method.r)
        packed = quantise(base.weight, method.double)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("steps", packed.steps)
        self.register_buffer("middle", packed.middle)
        self.register_buffer("origin", mark(base.weight))  # of the weight before it was quantised

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.method.alpha / self.method.r

    @property
    def quantised(self) -> int:
        """How many weights are kept in 4 bits; they are no parameters any more."""
        return self.shape.numel()

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The base weight ``[out, in]``."""
        packed = NF4(self.codes, self.scales, self.steps, self.middle)  # type: ignore[arg-type]
        return dequantise(packed, self.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""
        y = _Product.apply(input, self)  # [..., out]
        if self.bias is not None:
            y = y + self.bias
        return y + low_rank(self, input)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same in eval mode, in the type of the low-rank matrices."""
        return plain(self, self.weight_as(self.lora_b.dtype) + change(self))

    def extra_repr(self) -> str:
        """For printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.method.label()}"


class _Product(torch.autograd.Function):
    """``x Wᵀ`` with a frozen weight that is made when it is needed, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QLoRALinear) -> Tensor:
        """``x [..., in]`` → ``[..., out]``."""
        ctx.layer = layer
        return F.linear(x, layer.weight_as(x.dtype))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """The slope of ``x [..., in]``."""
        return slopes[0] @ ctx.layer.weight_as(slopes[0].dtype) if ctx.needs_input_grad[0] else None, None


@register("method", "qlora")
class QLoRA(Method):
    """Two thin matrices beside each linear layer, whose weight becomes NF4."""

    Config = QLoRAConfig

    def find(self, model: nn.Module, parameters: set[str]) -> list[str]:
        """See the contract."""
        return linear_layers(model, parameters, self.config)

    def install(self, model: nn.Module, name: str) -> None:
        """See the contract."""
        base = model.get_submodule(name)
        if type(base).forward is not nn.Linear.forward:
            raise ConfigError(f"{name} is a {type(base).__name__}: QLoRA changes plain linear layers only")
        shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is base.weight]
        if len(shared) > 1:
            raise ConfigError(f"{name} shares its weight with {shared[0]!r}: it cannot be kept in 4 bits")
        replace(model, name, QLoRALinear(base, self.config))  # type: ignore[arg-type]
