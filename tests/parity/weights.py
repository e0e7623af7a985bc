"""Weights for parity tests: nothing constant, nothing zero, so that no wrong norm, bias or order can hide."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Overwrite every parameter and buffer with ``scale · (normal ± 0.5)``; the weights of norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        value = scale * (noise + 0.5 * noise.sign())
        if tensor.ndim == 1 and name.endswith("weight"):
            value = 1 + value
        if name.endswith("running_var"):
            value = 0.5 + value.abs()
        tensor.copy_(value)
    return model.eval()


def rename(state: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """``state`` with substrings of its keys replaced, in order."""
    result = {}
    for key, tensor in state.items():
        for old, new in pairs:
            key = key.replace(old, new)
        result[key] = tensor
    return result


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """``randomise``, with convolutions that keep the size of what they carry: deep stacks of them would go dead."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan) ** 0.5)
    return model.eval()
