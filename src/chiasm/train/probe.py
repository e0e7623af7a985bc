"""The held-out loss during training, with the true pictures and with those of other examples.

Where the two are equal the model does not look at its pictures, however well the loss falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chiasm.data.base import Example, with_answer
from chiasm.data.loader import Renderer
from chiasm.data.shuffle import shuffled
from chiasm.train.objectives.base import Objective


class Probe:
    """Called at ``eval_every``: ``{"held_out/loss": …, "held_out/loss_shuffled": …}``."""

    def __init__(self, model: Any, renderer: Renderer, objective: Objective, examples: Sequence[Example], batch: int):
        self.model, self.objective, self.batch = model, objective, batch
        self.renderer = Renderer(renderer.processor, renderer.max_length)
        self.true = [with_answer(example) for example in examples]
        self.mixed = shuffled(self.true)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The losses per target token. The model is in eval mode."""
        found = {"held_out/loss": self._loss(self.true)}
        if self.mixed:
            found["held_out/loss_shuffled"] = self._loss(self.mixed)
        return found

    def _loss(self, examples: list[Example]) -> float:
        total = weight = 0.0
        for start in range(0, len(examples), self.batch):
            batch = self.renderer.batch(examples[start : start + self.batch])
            loss = self.objective(self.model, batch.to(self.model.device, dtype=self.model.dtype))
            total, weight = total + float(loss.total), weight + loss.weight
        return total / max(1.0, weight)
