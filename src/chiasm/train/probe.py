"""What is measured on held-out examples during training: their loss, and whether the model looks at its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chiasm.data.base import Example, with_answer
from chiasm.data.loader import Renderer
from chiasm.errors import DataError
from chiasm.train.meter import Meter, Reading
from chiasm.train.objectives.base import Objective


class Probe:
    """Called at evaluations and at the end of a stage, with the model in eval mode; gives numbers for the log.

    ``held_out/loss`` over all examples, and of those with media ``held_out/loss_shuffled`` and the meter's reading,
    ``image_use/…``. With ``seen`` the examples are training data, for want of others: the meter alone is read then.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        objective: Objective,
        examples: Sequence[Example],
        batch: int,
        seen: bool = False,
    ):
        self.model, self.objective, self.batch, self.seen = model, objective, batch, seen
        self.renderer = Renderer(renderer.processor, renderer.max_length)
        examples = [e for e in examples if _usable(self.renderer, e)] if seen else examples
        self.examples = [with_answer(example) for example in examples]
        self.meter = Meter(model, renderer, examples, batch)
        self.reading: Reading | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """The losses per target token. The model is in eval mode."""
        found: dict[str, Any] = {} if self.seen else {"held_out/loss": self._loss(self.examples)}
        self.reading = self.meter()
        if self.reading is not None:
            found |= {} if self.seen else {"held_out/loss_shuffled": self.reading.shuffled}
            found |= self.reading.record() | {"image_use/told": self.told()}
        return found

    def use(self, model: Any) -> None:
        """Measure this model: the one in pieces while ranks train it, the ordinary one afterwards."""
        self.model = self.meter.model = model

    def told(self) -> str:
        """The last reading in a sentence; empty where there is none."""
        if self.reading is None:
            return ""
        return self.reading.told() + (" of the training data" if self.seen else "")

    def _loss(self, examples: list[Example]) -> float:
        total = weight = 0.0
        for start in range(0, len(examples), self.batch):
            batch = self.renderer.batch(examples[start : start + self.batch])
            loss = self.objective(self.model, batch.to(self.model.device, dtype=self.model.dtype))
            total, weight = total + float(loss.total), weight + loss.weight
        return total / max(1.0, weight)


def _usable(renderer: Renderer, example: Example) -> bool:
    try:
        renderer.sample(example)
    except DataError:
        return False
    return True
