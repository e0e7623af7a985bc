"""Which parameters a result depends on, found by asking autograd without memory or arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.enable_grad()
def unreached(shapes: nn.Module, run: Callable[[Any], Tensor]) -> list[str]:
    """Names of the parameters of ``shapes``, a model on the ``meta`` device, that ``run(shapes)`` does not depend on.

    Empty where the model cannot run there, as one that reads numbers on its way: nothing is known then.
    """
    named = {name: p for name, p in shapes.named_parameters() if p.is_floating_point()}
    try:
        result = run(shapes.eval().requires_grad_())
        slopes = torch.autograd.grad(result.sum(), list(named.values()), allow_unused=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return []
    return [name for name, slope in zip(named, slopes, strict=True) if slope is None]


KEYS = ("k_proj.bias", "key.bias", "k_lin.bias")
"""What transformers calls the bias of attention's keys, where the three products are layers of their own."""


def key_biases(model: nn.Module) -> list[str]:
    """Names of key biases that attention cancels out; none where keys are turned or normed after the bias is added."""
    modules = [name.rpartition(".")[2].lower() for name, _ in model.named_modules()]
    if any("rotary" in name or "rope" in name or name in ("k_norm", "k_layernorm") for name in modules):
        return []
    return [name for name, _ in model.named_parameters() if name.endswith(KEYS)]
