"""Momentum copies: a copy that goes after a module slowly, saved with it and never trained.

Papers: MoCo (arXiv:1911.05722), ALBEF (arXiv:2107.07651). A copy's tensors are buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def as_buffers(module: Any) -> Any:
    """The module with every parameter made a buffer of the same name: saved, and never trained. Ties stay."""
    made: dict[int, Tensor] = {}
    for part_ in module.modules():
        for name, parameter in list(part_.named_parameters(recurse=False, remove_duplicate=False)):
            del part_._parameters[name]
            part_.register_buffer(name, made.setdefault(id(parameter), parameter.detach()))
    return module.eval()


@torch.no_grad()
def follow(module: nn.Module, copied: nn.Module, rate: float) -> None:
    """``copied`` keeps the share ``rate`` of itself and takes the rest from ``module``, of whose parameters it is."""
    own, copies = list(module.parameters()), _unique(copied.buffers())
    torch._foreach_lerp_(copies, [p.to(c.dtype) for p, c in zip(own, copies, strict=True)], 1 - rate)


def _unique(tensors: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


__all__ = ["as_buffers", "follow"]
