"""Marks of tensors, which tell whether a single number of one changed.

A mark is two integer sums over a tensor's bits: exact, so that the smallest change of one number shows, and as cheap as
reading the tensor once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chiasm.train.faults import finite

Mark = tuple[int, int]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW, _CHUNK = 1024, 1 << 22


@torch.no_grad()
def marks(tensors: Mapping[str, Tensor]) -> dict[str, Mark]:
    """The mark of each tensor; of one in pieces on several ranks, the sum over them, so that all ranks see the same.

    One transfer from the device for all of them.
    """
    found: list[Tensor] = []
    for tensor in tensors.values():
        found += _mark(own(tensor))
    if not found:
        return {}
    devices: dict[torch.device, list[int]] = {}
    for i, value in enumerate(found):
        devices.setdefault(value.device, []).append(i)
    numbers = [0] * len(found)
    for places in devices.values():
        together = torch.stack([found[i] for i in places])
        if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
            torch.distributed.all_reduce(together)
        for i, value in zip(places, together.tolist(), strict=True):
            numbers[i] = value
    return {name: (numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(tensors)}


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a value which is no finite number."""
    floats = {name: own(t) for name, t in tensors.items() if t.is_floating_point()}
    if not floats:
        return []
    # a sum of absolute values is finite unless a value is not, or it overflows; only then is each value looked at
    sums = torch.stack(
        [t.abs().sum(dtype=torch.float64 if t.device.type != "mps" else None).cpu() for t in floats.values()]
    )
    pieces = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    if pieces:
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, sums)
        sums = torch.stack(gathered).sum(0)
    odd = (~torch.isfinite(sums)).tolist()
    return [name for name, o in zip(floats, odd, strict=True) if o and (pieces or not finite(floats[name]))]


def own(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor; the tensor itself where it is whole."""
    local = getattr(tensor, "to_local", None)
    return (local() if local is not None else tensor).detach()


def _mark(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sum ``[]`` of a tensor's numbers read as integers, and the same weighted by their column, in int64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])  # [n]
    weights = torch.arange(1, _ROW + 1, device=flat.device)
    plain, weighted = torch.zeros((), dtype=torch.int64, device=flat.device), 0
    for piece in flat.split(_CHUNK):
        whole = len(piece) // _ROW * _ROW
        columns = piece[:whole].view(-1, _ROW).sum(0, dtype=torch.int64)  # [1024]
        rest = piece[whole:].to(torch.int64)
        columns[: len(rest)] += rest
        plain = plain + columns.sum()
        weighted = weighted * 31 + (columns * weights).sum()
    return plain, torch.as_tensor(weighted, device=flat.device)
