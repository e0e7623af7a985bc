"""Weight matrices laid out once as the processor's matrix product wants them, for work that repeats.

A product in bfloat16 on a CPU first copies its weights into blocks; where thousands of pictures pass through the same
layers, that copy can be kept. ``with Packed().used():`` keeps one for each layer that ``linear`` is called with in the
block, by the thread that entered it; the copies are as large as the weights and go with the object.

Reference: ``mkldnn::_linear_pointwise`` of torch, which its compiler uses for the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.nn import kernels

_NOW: ContextVar[Packed | None] = ContextVar("packed", default=None)


class Packed:
    """The laid out weights of layers. Several threads may use one at once."""

    def __init__(self) -> None:
        self.held: dict[nn.Module, tuple[Any, Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block, in this thread, ``linear`` keeps what it lays out."""
        token = _NOW.set(self)
        try:
            yield
        finally:
            _NOW.reset(token)

    def of(self, layer: nn.Linear | nn.Conv2d, rows: int) -> Tensor:
        """The weights of a layer, laid out for about so many ``rows``; again where they were changed meanwhile."""
        state = kernels.state(layer.weight)
        found = self.held.get(layer)
        if found is None or found[0] != state:
            weight = layer.weight.detach().flatten(1)
            found = state, torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            self.held[layer] = found
        return found[1]

    def product(self, layer: nn.Linear | nn.Conv2d, rows: Tensor) -> Tensor:
        """``rows [n, k]`` times a layer's weights (a convolution's as ``[D_out, k]``) and its bias: ``[n, D_out]``."""
        found = torch.ops.mkldnn._linear_pointwise(rows, self.of(layer, len(rows)), layer.bias, "none", [], "")
        return found  # type: ignore[no-any-return]


def used_for(layer: nn.Module, x: Tensor) -> Packed | None:
    """What holds laid out weights for this product, in this thread; None where the layer computes as ever."""
    packed = _NOW.get()
    if packed is None or layer.weight.dtype != torch.bfloat16 or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    return packed if _possible() and kernels.plain(x) else None


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``: ``x [..., D]`` → ``[..., D_out]``, by laid out weights where a ``Packed`` is used."""
    packed = used_for(layer, x) if type(layer) is nn.Linear else None
    if packed is None or not isinstance(layer, nn.Linear):
        return layer(x)  # type: ignore[no-any-return]
    return packed.product(layer, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)


@functools.cache
def _possible() -> bool:
    """Whether this torch has the two calls, and they give what ``nn.Linear`` gives."""
    weight, x = torch.randn(24, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    try:
        laid = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        found = torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool(torch.allclose(found.float(), x.float() @ weight.float().T, atol=0.1))
