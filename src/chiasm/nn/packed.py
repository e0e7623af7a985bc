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

import torch
from torch import Tensor, nn

from chiasm.nn import kernels

_NOW: ContextVar[Packed | None] = ContextVar("packed", default=None)


class Packed:
    """The laid out weights of layers. Several threads may use one at once."""

    def __init__(self) -> None:
        self.held: dict[nn.Linear, tuple[int, Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block, in this thread, ``linear`` keeps what it lays out."""
        token = _NOW.set(self)
        try:
            yield
        finally:
            _NOW.reset(token)

    def of(self, layer: nn.Linear, rows: int) -> Tensor:
        """The weights of a layer, laid out for about so many ``rows``; again where they were changed meanwhile."""
        version = 0 if layer.weight.is_inference() else layer.weight._version  # those of inference never change
        found = self.held.get(layer)
        if found is None or found[0] != version:
            found = version, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            self.held[layer] = found
        return found[1]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``: ``x [..., D]`` → ``[..., D_out]``, by laid out weights where a ``Packed`` is used."""
    packed = _NOW.get()
    plain = packed is not None and type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
    if not plain or layer._forward_hooks or layer._forward_pre_hooks or not _possible() or not kernels.plain(x):
        return layer(x)  # type: ignore[no-any-return]
    assert packed is not None and isinstance(layer, nn.Linear)
    rows = x.reshape(-1, x.shape[-1])  # [n, D]
    weights = packed.of(layer, len(rows))
    found = torch.ops.mkldnn._linear_pointwise(rows, weights, layer.bias, "none", [], "")  # [n, D_out]
    return found.view(*x.shape[:-1], layer.out_features)  # type: ignore[no-any-return]


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
