"""Cross-entropy of the next token, at the labelled positions only."""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm import registry
from chiasm.fusion.base import Fusion
from chiasm.fusion.splice import labelled
from chiasm.train.objectives.base import Loss
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.types import Batch, Output


@registry.register("objective", "next_token")
def next_token(model: Fusion, batch: Batch) -> Loss:
    """The loss in float32, whatever the model computes in. A batch without any target gives exactly 0 with weight 0."""
    output = model(batch, logits="states")
    assert output.states is not None and output.targets is not None and output.head is not None
    total, losses = cross_entropy(output.states, output.targets, output.head)  # [], [n]
    return Loss(total, losses.numel(), by_source(batch, output, losses))


def by_source(batch: Batch, output: Output, losses: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss sums and token counts of each data source in the batch, ``[]`` each, still on the device."""
    names = sorted(set(batch.sources))
    number = torch.tensor([names.index(s) for s in batch.sources], device=losses.device)[owners(batch, output)]  # [n]
    sums = torch.zeros(len(names), device=losses.device).index_add(0, number, losses)
    counts = torch.bincount(number, minlength=len(names))
    return {f"source/{n}": (s, c) for n, s, c in zip(names, sums, counts, strict=True)}


def owners(batch: Batch, output: Output) -> Tensor:
    """Which sample of ``batch.ids`` each target ``[n]`` belongs to, in padded and in packed batches."""
    assert output.target_rows is not None
    if len(batch.ids) == len(batch.input_ids):
        return output.target_rows
    return samples_of(batch, *labelled(batch))


def samples_of(batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
    """Which sample of ``batch.ids`` the positions at ``rows`` and ``columns`` ``[n]`` belong to."""
    if len(batch.ids) == len(batch.input_ids):
        return rows
    before = batch.segment_ids.amax(dim=1).cumsum(0).roll(1)  # segments of the rows above
    before[0] = 0
    return before[rows] + batch.segment_ids[rows, columns] - 1
