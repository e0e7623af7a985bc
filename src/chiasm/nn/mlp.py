"""The two-layer perceptron of a transformer block, and the activations that published models use.

Three functions go by the name GELU: the exact one (``gelu``), its tanh approximation (``gelu_tanh``, SigLIP) and
``x · sigmoid(1.702 x)`` (``quick_gelu``, the CLIP of OpenAI). They differ by up to 2e-2, so a tower must say which
is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError, nearest
from chiasm.nn import kernels
from chiasm.nn.packed import linear
from chiasm.nn.quant import Quantized


def quick_gelu(x: Tensor) -> Tensor:
    """``x [...]`` → ``x · sigmoid(1.702 x)`` of the same shape (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """``x [...]`` → the tanh approximation of GELU, same shape."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def gated(gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(gate) · up``, all ``[...]`` of one shape."""
    if function is F.silu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return]
    return function(gate) * up


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) · up``; the activated gate is computed again on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """``gate``, ``up`` ``[...]`` → ``[...]``."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """``slopes[0] [...]`` → the gradients of ``gate`` and ``up``."""
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(slopes[0] * up, gate)
        return of_gate, F.silu(gate).mul_(slopes[0])


def gated_down(gate: Tensor, up: Tensor, down: nn.Module, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``down(function(gate) · up)``: ``gate``, ``up`` ``[..., H]`` → ``[..., D]``.

    Where ``down`` is a plain linear layer that is trained, its input is computed again on the way back instead of being
    kept. Hooks, which look at what goes in and out of the layer, have it run as it is.
    """
    plain = type(down) is nn.Linear and down.bias is None and not (down._forward_hooks or down._forward_pre_hooks)
    lean = plain and function is F.silu and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if lean and down.weight.requires_grad:
        return _GatedDown.apply(gate, up, down.weight)  # type: ignore[no-any-return]
    return down(gated(gate, up, function))  # type: ignore[no-any-return]


class _GatedDown(torch.autograd.Function):
    """``(silu(gate) · up) weightᵀ``, keeping ``gate`` and ``up`` alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """``gate``, ``up`` ``[..., H]``, ``weight [D, H]`` → ``[..., D]``."""
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """``slopes[0] [..., D]`` → the gradients of ``gate``, ``up`` and ``weight``."""
        gate, up, weight = ctx.saved_tensors
        rows = slopes[0].flatten(0, -2)  # [n, D]
        slope = (rows @ weight).view(gate.shape)  # [..., H]
        active = F.silu(gate)
        of_weight = rows.T @ (active * up).flatten(0, -2)  # [D, H]
        of_gate = torch.ops.aten.silu_backward(slope * up, gate)
        return of_gate, active.mul_(slope), of_weight


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called ``name``. Raises ConfigError that names the nearest known ones."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Activation(nn.Module):
    """An activation as a module, for use inside ``nn.Sequential``."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.function = activation(name)

    def forward(self, x: Tensor) -> Tensor:
        """``x [...]`` → same shape."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The name, for printing."""
        return self.name


class MLP(nn.Module):
    """``fc2(activation(fc1(x)))``, both layers with bias."""

    def __init__(self, dim: int, hidden: int, activation_name: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = activation(activation_name)
        self.name = activation_name
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, N, D]`` → ``[B, N, D]``."""
        inner = linear(self.fc1, x)  # [B, N, hidden]
        own = (
            type(self.fc1) in (nn.Linear, Quantized) and not self.fc1._forward_hooks
        )  # nobody else holds what it gives
        if own and self.name in kernels.ACTIVATIONS and kernels.plain(inner):
            inner = kernels.activate_(inner, self.name)
        else:
            inner = self.activation(inner)
        return linear(self.fc2, inner)
