"""Activation checkpointing: what a block computes inside is computed again on the way back, not kept.

Paper: Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174). Reference: ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def call(block: nn.Module, again: bool, *args: Any) -> Any:
    """``block(*args)``; with ``again`` and gradients only its input is kept. Random numbers come out the same."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
