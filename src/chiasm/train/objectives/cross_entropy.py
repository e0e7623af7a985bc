"""Head and cross-entropy in chunks: the logits of all targets never stand in memory at once.

Papers: Cut Your Losses (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989) fuse head and loss in this way.
Reference: ``torch.nn.functional.cross_entropy`` over the logits of all targets, equal to 1e-6 in float32.

Differences by design: the head is any differentiable function, found parameters included (a low-rank update beside it,
say), not a bare weight matrix; gradients are made where the loss is, chunk by chunk, so no logits are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.train.widths import few

Head = Callable[[Tensor], Tensor]

BUDGET = 32 * 2**20
"""Bytes of float32 logits that one chunk may take, at least; half the head's own gradient where that is more."""


def cross_entropy(states: Tensor, targets: Tensor, head: Head, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """``states [n, D]``, ``targets [n]`` → the differentiable sum of the losses ``[]`` and the losses ``[n]``, float32.

    ``chunk`` is the number of rows whose logits are computed together; None: as many as ``BUDGET`` says. The gradients
    of the head's parameters are summed in float32 over the chunks.
    """
    if len(states) == 0:
        return states.float().sum() * 0.0, states.new_zeros(0, dtype=torch.float32)
    probe = head(states[:1])  # the graph of one row shows which parameters the head uses
    parameters = _leaves(probe, states)
    rows = chunk or max(1, max(BUDGET, 2 * sum(p.numel() for p in parameters)) // (4 * probe.shape[-1]))
    if not probe.requires_grad:
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        losses = torch.cat([_losses(head(s), t)[0] for s, t in parts])  # [n]
        return losses.sum(), losses
    return _Chunked.apply(states, targets, head, rows, *parameters)  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """The sum of the losses and, in the same pass, its gradients."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head, rows: int, *parameters: Tensor) -> Any:
        """``states [n, D]``, ``targets [n]`` → sum ``[]``, losses ``[n]``."""
        sums: list[Tensor | None] = [None] * len(parameters)
        losses, slopes = [], []
        for start in range(0, len(states), rows):
            part = _filled(states[start : start + rows].detach()).requires_grad_(states.requires_grad)
            with torch.enable_grad():
                logits = head(part)  # [r, V]
            loss, slope = _losses(logits.detach(), targets[start : start + rows], slope=True)
            losses.append(loss)
            wanted = [part, *parameters] if states.requires_grad else list(parameters)
            found = list(torch.autograd.grad(logits, wanted, slope, allow_unused=True))
            del logits, slope
            if states.requires_grad:
                slopes.append(found.pop(0)[: len(loss)])
            sums = [_add(total, g, alone=len(states) <= rows) for total, g in zip(sums, found, strict=True)]
        ctx.slopes = torch.cat(slopes) if slopes else None  # [n, D]
        ctx.sums = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        each = torch.cat(losses)  # [n]
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """The gradients that ``forward`` made, times the sum's own ``slopes[0] []``. Runs once."""
        scaled = [None if s is None else s.mul_(slopes[0].to(s.dtype)) for s in (ctx.slopes, *ctx.sums)]
        return scaled[0], None, None, None, *scaled[1:]


def _losses(logits: Tensor, targets: Tensor, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """``logits [r, V]``, ``targets [t]`` → losses ``[t]`` and, where asked, their slopes ``[r, V]`` in logits' type.

    Rows behind the targets are filling: they have slopes of 0.
    """
    real = len(targets)
    wide = logits.float()  # [r, V]
    total = wide.logsumexp(-1)  # [r]
    losses = total[:real] - wide[:real].gather(1, targets.unsqueeze(1)).squeeze(1)
    if not slope:
        return losses, None
    wide = wide if wide is not logits else wide.clone()
    wide.sub_(total.unsqueeze(1)).exp_()
    wide[torch.arange(real, device=targets.device), targets] -= 1.0
    wide[real:] = 0.0
    return losses, wide.to(logits.dtype)


def _filled(states: Tensor) -> Tensor:
    """``[r, D]`` with rows of 0 behind, up to one of few numbers of rows, where each makes kernels: see ``widths``."""
    makes = states.device.type == "cpu" and states.dtype == torch.bfloat16
    missing = few(len(states)) - len(states) if makes else 0
    return F.pad(states, (0, 0, 0, missing)) if missing else states


def _add(total: Tensor | None, gradient: Tensor | None, alone: bool) -> Tensor | None:
    """A sum in float32; the gradient itself where it is the only one."""
    if gradient is None or alone:
        return gradient if total is None else total
    return gradient.float() if total is None else total.add_(gradient)


def _leaves(result: Tensor, states: Tensor) -> list[Tensor]:
    """The parameters that ``result``'s graph ends in; what lies behind ``states`` is not searched."""
    found: dict[int, Tensor] = {}
    stop = states.grad_fn
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node is stop or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not states:
            found[id(variable)] = variable
        waiting += [parent for parent, _ in node.next_functions]
    return list(found.values())
