"""Root-mean-square normalisation (arXiv:1910.07467), computed in float32 whatever the type of the model, and
torch's layer norm with a compiled way for towers on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.nn import kernels


class LayerNorm(nn.LayerNorm):
    """torch's over the last dimension; in bfloat16 on a CPU, where no gradient is wanted, by a compiled kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D]`` → ``[..., D]``."""
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if not learns and self.bias is not None and self.weight.dtype == torch.bfloat16 and kernels.plain(x):
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension.

    The quotient is rounded to the input's type before it is multiplied with ``weight``, as Llama's reference does: in
    bfloat16 the order is visible.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D]`` → ``[..., D]``."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Lean.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]
        return self.weight * _normed(x, self.eps)[0]


class _Lean(torch.autograd.Function):
    """The same, keeping its input for the way back instead of the float32 tensors on the way: a fifth of the memory in
    bfloat16, half in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x [..., D]``, ``weight [D]`` → ``[..., D]``."""
        normed, inverse = _normed(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """``slopes[0] [..., D]`` → the gradients of ``x`` and ``weight``."""
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse  # [..., D]
        slope = slopes[0].float()
        of_weight = (slope * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        slope = slope * weight.float()
        share = (slope * unit).mean(-1, keepdim=True)  # [..., 1]
        return slope.sub_(unit.mul_(share)).mul_(inverse).to(x.dtype), of_weight, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` → ``x / rms [..., D]`` in its own type and ``1 / rms [..., 1]`` in float32."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype), inverse
