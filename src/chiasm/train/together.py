"""The gradient of a loss that compares all samples of a step, whatever a step's size and however it is cut.

    1. each micro-batch → its rows, without a graph           (random states are kept)
    2. rows of the step, on all ranks → loss → the gradient of every row, and of the scale
    3. each micro-batch again, with a graph and the same random states → backward of rows · gradients

Memory holds one micro-batch's graph and a row for each sample: GradCache (arXiv:2101.06983). A step of one micro-batch
needs no second pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.data import randomness
from chiasm.errors import ChiasmError
from chiasm.train.distributed import Alone
from chiasm.train.objectives.base import Loss, Rows, StepObjective
from chiasm.types import Batch

REPEATED = 0.02
"""How far a row made again may be from the first, as a share of its length: bfloat16 kernels need not repeat bits."""


def backward(
    objective: StepObjective,
    model: Any,
    parts: Sequence[Callable[[], Batch]],
    several: bool,
    ranks: Alone,
    collect: Callable[[], None],
) -> Loss:
    """Adds the gradients of this rank's share of a step's loss to the parameters, and returns it.

    ``parts`` put this rank's micro-batches on the device when called. ``several``: some rank has more than one, so all
    go twice over theirs. ``collect`` is called after each backward pass. Raises ChiasmError where the model does not
    make the same rows twice.
    """
    if not several:
        rows = objective.embed(model, parts[0]()) if parts else None
        loss = objective.compare(model, rows, ranks)
        if loss.total.requires_grad and finite(loss.total):
            loss.total.backward()
            collect()
        return loss
    found, states, counters = _first(objective, model, parts)
    rows = joined(found) if found else None
    loss = objective.compare(model, rows, ranks)
    if not (loss.total.requires_grad and finite(loss.total)):
        return loss
    loss.total.backward()
    collect()
    for buffer, value in counters:  # running statistics count a batch once
        buffer.copy_(value)
    start = 0
    for part, state, once in zip(parts, states, found, strict=True):
        randomness.restore(state)
        again = objective.embed(model, part())
        _check_same(once, again)
        assert rows is not None
        span = slice(start, start + len(again))
        start += len(again)
        learned = {name: v for name, v in again.vectors.items() if v.requires_grad}
        slopes = [rows.vectors[name].grad[span].to(v.dtype) for name, v in learned.items()]  # type: ignore[index]
        torch.autograd.backward(list(learned.values()), slopes)
        collect()
    return loss


@torch.no_grad()
def _first(
    objective: StepObjective, model: nn.Module, parts: Sequence[Callable[[], Batch]]
) -> tuple[list[Rows], list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The rows of each micro-batch, the random states before it, and the running statistics before all."""
    counted = [m for m in model.modules() if getattr(m, "track_running_stats", False) and m.training]
    counters = [(buffer, buffer.clone()) for m in counted for buffer in m.buffers(recurse=False)]
    rows, states = [], []
    for part in parts:
        states.append(randomness.state() | randomness.accelerator_states())
        rows.append(objective.embed(model, part()))  # type: ignore[arg-type]
    return rows, states, counters


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several micro-batches one after the other, as leaves that take gradients."""
    first = parts[0]
    vectors = {name: torch.cat([p.vectors[name] for p in parts]).detach().requires_grad_() for name in first.vectors}
    return Rows(vectors, {name: torch.cat([p.keys[name] for p in parts]) for name in first.keys})


def finite(total: Tensor) -> bool:
    """Whether a loss is a number. Accelerators are not asked here, but once a step, so that nothing waits for them."""
    return total.device.type != "cpu" or math.isfinite(float(total.detach()))


def _check_same(once: Rows, again: Rows) -> None:
    """The two passes must agree, or the gradient would belong to other rows."""
    for name, before in once.vectors.items():
        after = again.vectors[name].detach()
        if before.device.type != "cpu" or not len(before):
            continue
        apart = float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).max())
        if apart > REPEATED:
            raise ChiasmError(
                f"the model made other {name} vectors of the same batch the second time (apart by {apart:.3g} of their "
                f"length, {REPEATED} allowed): a step of several micro-batches needs a model whose randomness comes "
                "from torch's generators; set accumulate: 1, or take the other source of chance out of it"
            )


def counted(loss: Loss, batches: Sequence[Batch]) -> dict[str, Any]:
    """What a step's ``Tally`` is made of: sums and counts over this rank's samples."""
    ids = [id for batch in batches for id in batch.ids if id]
    positions = sum(batch.input_ids.numel() for batch in batches if any(batch.ids))
    return {
        **{"total": loss.total.detach(), "weight": float(loss.weight), "samples": len(ids)},
        **{"positions": positions, "parts": dict(loss.parts), "ids": ids},
    }
