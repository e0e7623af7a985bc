"""Rows of all ranks: gathered with gradients that come home, or passed round in a ring.

gathered   [n, D] on each rank → [N, D] on all; the gradient of row i is the sum of what all ranks' losses say of it
ring       each rank's rows visit every rank in turn, and the gradients gathered on the way come home with them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chiasm.train.distributed import Alone
from chiasm.train.objectives.base import Rows


def met(rows: Rows | None, ranks: Alone, device: torch.device) -> tuple[Rows | None, list[int]]:
    """The rows, empty ones for a rank without samples, and how many each rank has. None where no rank has any."""
    told = None
    if rows is not None:
        shapes = {name: (v.shape[1], v.dtype, v.requires_grad) for name, v in rows.vectors.items()}
        told = len(rows), shapes, list(rows.keys)
    everyone = ranks.gather(told, "comparing the samples of a step")
    form = next((t for t in everyone if t is not None), None)
    if form is None:
        return None, [0] * ranks.count
    if rows is None:
        vectors = {n: torch.zeros(0, d, dtype=kind, device=device) for n, (d, kind, _) in form[1].items()}
        keys = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in form[2]}
        rows = Rows({n: v.requires_grad_(form[1][n][2] and torch.is_grad_enabled()) for n, v in vectors.items()}, keys)
    return rows, [t[0] if t is not None else 0 for t in everyone]


def gathered(x: Tensor, sizes: Sequence[int], ranks: Alone) -> Tensor:
    """``x [n, ...]`` of every rank in their order, ``[sum of sizes, ...]``. Backward sums gradients over the ranks."""
    if ranks.count == 1:
        return x
    return _Gathered.apply(x, list(sizes), ranks.rank)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        """``x [n, ...]`` → ``[N, ...]``."""
        ctx.span = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:])  # ranks have unequal shares of a last batch
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, sizes, strict=True)])  # [N, ...]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """``slopes[0] [N, ...]`` of this rank's loss → those of this rank's rows ``[n, ...]`` from all losses."""
        total = slopes[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.span], None, None


Visit = Callable[[Tensor, Tensor, int], Tensor]  # (rows [m, D], keys [m, K], owner) → gradient of the rows [m, D]


def ring(rows: Tensor, keys: Tensor, sizes: Sequence[int], ranks: Alone, visit: Visit) -> Tensor:
    """Show every rank's ``rows [n, D]`` and ``keys [n, K]`` to ``visit``; returns the summed gradient of this rank's.

    No rank ever holds more than two blocks. Every block makes the whole round with the gradients it was given.
    """
    held, marks, slope = rows.contiguous(), keys.contiguous(), torch.zeros_like(rows)
    for hop in range(ranks.count):
        owner = (ranks.rank - hop) % ranks.count
        slope = slope + visit(held, marks, owner)
        if ranks.count > 1:
            size = sizes[(owner - 1) % ranks.count]
            held, marks, slope = (_passed(t, size, ranks) for t in (held, marks, slope))
    return slope


def _passed(x: Tensor, size: int, ranks: Alone) -> Tensor:
    """Give ``x`` to the next rank; returns the previous one's ``[size, ...]``."""
    got = x.new_empty(size, *x.shape[1:])
    after, before = (ranks.rank + 1) % ranks.count, (ranks.rank - 1) % ranks.count
    moves = [dist.P2POp(dist.isend, x.contiguous(), after)] if x.numel() else []
    moves += [dist.P2POp(dist.irecv, got, before)] if got.numel() else []
    for work in dist.batch_isend_irecv(moves) if moves else []:
        work.wait()
    return got
