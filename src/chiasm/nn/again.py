"""Activation checkpointing: what a block computes inside is computed again on the way back, not kept.

Paper: Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174). Reference: ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_around: ContextVar[Callable[[], AbstractContextManager[Any]] | None] = ContextVar("around", default=None)


def call(block: nn.Module, again: bool, *args: Any) -> Any:
    """``block(*args)``; with ``again`` and gradients only its input is kept. Random numbers come out the same."""
    if not (again and torch.is_grad_enabled()):
        return block(*args)
    around = _around.get()
    if around is None:
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), around()))


@contextmanager
def computed_again_in(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Blocks that run inside are later computed again inside of ``around()``: modes do not reach the way back by
    themselves.
    """
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)
