"""A model of shapes alone on batches whose words are real: what a forecast needs for objectives that read words.

Hidden words, equal texts and slots are looked up in ids and masks, so those stay numbers on the CPU; pictures, weights
and all that comes of them have shapes only. Where the two meet, the result has a shape only. What is asked of a number
that is not there (which pair is hardest) is answered with one that could be: the first of all, and every one of a mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from chiasm.types import Batch

_ATEN = torch.ops.aten
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)


class Mixed(TorchDispatchMode):
    """Inside, an operation on a tensor with numbers and one without gives one without."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, on ``meta`` where one of its tensors is there."""
        kwargs = kwargs or {}
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is _ATEN.nonzero.default and args[0].is_meta:
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device="meta")
        if func is _ATEN._to_copy.default:
            return _moved(func, args, kwargs)
        if func in _INDEXED:
            args = (args[0], _places(args[1], args[0].is_meta), *args[2:])
        kinds = {t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if len(kinds) == 2:
            args, kwargs = tree_map(_shape, (args, kwargs))
        return func(*args, **kwargs)


def words_kept(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its ids and masks as they are, its media and scores as shapes in ``dtype``."""
    made = batch.to("cpu", dtype=dtype)
    media = {kind: replace(m, inputs=_shape(m.inputs)) for kind, m in made.media.items()}
    return replace(made, media=media, scores=None if made.scores is None else _shape(made.scores))


def counters_kept(shapes: nn.Module) -> None:
    """Give buffers of one number (a queue's place, a count of steps) a number again: 0."""
    for module in shapes.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and buffer.numel() == 1:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _moved(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A copy to another device: whole numbers keep their values, and shapes that must have values get them."""
    tensor, device = args[0], kwargs.get("device")
    given: Tensor = func(*args, **({**kwargs, "device": tensor.device}))
    if device is None or torch.device(device).type == tensor.device.type:
        return given
    if tensor.is_meta:
        return (torch.ones if given.dtype == torch.bool else torch.zeros)(given.shape, dtype=given.dtype)
    return _shape(given) if given.is_floating_point() else given


def _places(indices: Any, shapes: bool) -> list[Any]:
    """Masks as the places where they are true; in a tensor with numbers (not ``shapes``) unknown ones as the first."""
    found: list[Any] = []
    for index in indices:
        if not isinstance(index, Tensor):
            found.append(index)
        elif index.dtype == torch.bool:
            places = index.nonzero() if not index.is_meta else torch.empty(index.numel(), index.ndim, device="meta")
            found += [_known(column.long(), shapes) for column in places.unbind(1)]
        else:
            found.append(_known(index, shapes))
    return found


def _known(index: Tensor, shapes: bool) -> Tensor:
    return torch.zeros(index.shape, dtype=index.dtype) if index.is_meta and not shapes else index


def _shape(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) and not value.is_meta else value
