"""Few lengths instead of any: packed rows of small models in bfloat16 on the CPU are filled up to a few widths.

oneDNN makes a kernel for every shape of a bfloat16 product, in about a millisecond, and keeps it, in about half a MiB;
a width of a packed row takes nine of them, and rows of samples of all lengths have as many widths as there are steps.
Filling costs arithmetic, in proportion to the model; kernels cost the same for every model. So rows are filled where
that is the smaller price, to ``WIDTHS`` widths between a power of two and the next: at most 1/16 more, 1/50 on average.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.types import Batch

WIDTHS = 16
"""Widths in each doubling."""

SMALL = 32_000_000
"""Parameters up to which a row is filled. Nine kernels take as long as a fiftieth of a step of 2000 tokens at 10 M."""


def few(length: int, widths: int = WIDTHS, least: int = 16) -> int:
    """The next of the ``widths`` multiples between two powers of two, and always a multiple of ``least``."""
    step = max(least, (1 << (length - 1).bit_length()) // (2 * widths)) if length > 1 else least
    return -(-length // step) * step


def fills(model: nn.Module, low: bool) -> bool:
    """Whether packed rows of this model are filled; ``low``: it runs in bfloat16."""
    sizes = [p.numel() for p in model.parameters()]
    return low and next(model.parameters()).device.type == "cpu" and sum(sizes) <= SMALL


def filled(batch: Batch) -> Batch:
    """The batch ``[1, T]`` in one of few widths, with padding behind that no position reads; any other as it is.

    Slots and targets are places in the row, which stay where they are.
    """
    rows, length = batch.input_ids.shape
    missing = few(length) - length
    if rows != 1 or missing == 0 or batch.target_ids is not None:
        return batch

    def wider(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing))

    return replace(
        batch,
        input_ids=wider(batch.input_ids),  # [1, T'], as the others
        positions=wider(batch.positions),
        segment_ids=wider(batch.segment_ids),
        loss_mask=wider(batch.loss_mask),
        masked_ids=None if batch.masked_ids is None else wider(batch.masked_ids),
        masked=None if batch.masked is None else wider(batch.masked),
    )
