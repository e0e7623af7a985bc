"""Stochastic depth: in training a block's branch is left out for some samples, the more often the deeper it stands.

Paper: Deep Networks with Stochastic Depth (arXiv:1603.09382). Reference: ``drop_path`` of timm, as BEiT-3 and VLMo use
it: by sample, what is kept is divided by its chance, and the chance of the last block is the rate, of the first 0.

Random numbers come from torch's generator of the device. A branch that is left out is computed all the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from chiasm.errors import ConfigError


def dropped(branch: Tensor, rate: float, training: bool) -> Tensor:
    """``branch [B, ...]`` → the same, in training 0 for each sample with chance ``rate`` and else over ``1 - rate``."""
    if not training or rate == 0:
        return branch
    kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - rate)  # [B, 1, ...]
    return branch * kept.div_(1 - rate)


def set_depth(model: nn.Module, rate: float) -> int:
    """Give every block that has a ``drop_path`` its rate, in each stack from 0 to ``rate``; how many blocks have one.

    Raises ConfigError where a rate is asked for and no block has one.
    """
    stacks = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    found = [[block for block in stack if hasattr(block, "drop_path")] for stack in stacks]
    for stack in found:
        for i, block in enumerate(stack):
            block.drop_path = rate * i / max(1, len(stack) - 1)  # type: ignore[assignment]
    count = sum(map(len, found))
    if rate and not count:
        raise ConfigError(f"drop_path {rate}: no block of this model can be left out; take drop_path out of the stage")
    return count


__all__ = ["dropped", "set_depth"]
