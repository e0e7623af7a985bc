"""What is measured on held-out examples during training: their loss, and whether the model looks at its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chiasm.data.base import Example, with_answer
from chiasm.data.loader import Renderer
from chiasm.errors import DataError
from chiasm.train.meter import Meter, Reading
from chiasm.train.objectives.base import Objective, StepObjective
from chiasm.train.together import joined


class Probe:
    """Called at evaluations and at the end of a stage, with the model in eval mode; gives numbers for the log.

    ``held_out/loss`` over all examples, and of those with media ``held_out/loss_shuffled`` and the meter's reading,
    ``image_use/…``. With ``seen`` the examples are training data, for want of others: the meter alone is read then.
    An objective that compares samples compares all examples with each other; there is no meter for it, as a picture
    that says nothing cannot be told from others. Nor is there one for a model that writes nothing.
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
        compares = isinstance(objective, StepObjective)
        compares = compares or getattr(getattr(renderer.processor, "template", None), "beside", False)
        self.examples = list(examples) if compares else [with_answer(example) for example in examples]
        self.meter = None if compares else Meter(model, renderer, examples, batch)
        self.reading: Reading | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """The losses per target token. The model is in eval mode."""
        found: dict[str, Any] = {} if self.seen else self._loss(self.examples)
        self.reading = self.meter() if self.meter else None
        if self.reading is not None:
            found |= {} if self.seen else {"held_out/loss_shuffled": self.reading.shuffled}
            found |= self.reading.record() | {"image_use/told": self.told()}
        return found

    def use(self, model: Any) -> None:
        """Measure this model: the one in pieces while ranks train it, the ordinary one afterwards."""
        self.model = model
        if self.meter:
            self.meter.model = model

    def told(self) -> str:
        """The last reading in a sentence; empty where there is none."""
        if self.reading is None:
            return ""
        return self.reading.told() + (" of the training data" if self.seen else "")

    def _loss(self, examples: list[Example]) -> dict[str, float]:
        """The mean loss, and what an objective that compares samples counts beside it."""
        total = weight = 0.0
        rows, also = [], {}
        for start in range(0, len(examples), self.batch):
            batch = self.renderer.batch(examples[start : start + self.batch])
            batch = batch.to(self.model.device, dtype=self.model.dtype)
            if isinstance(self.objective, StepObjective):
                rows.append(self.objective.embed(self.model, batch))
                continue
            loss = self.objective(self.model, batch)
            total, weight = total + float(loss.total), weight + loss.weight
        if isinstance(self.objective, StepObjective) and rows:
            loss = self.objective.compare(self.model, joined(rows))
            total, weight = float(loss.total), loss.weight
            also = {
                f"held_out/{n}": float(s / w) for n, (s, w) in loss.parts.items() if w and not n.startswith("source/")
            }
        return {"held_out/loss": total / max(1.0, weight)} | also


def _usable(renderer: Renderer, example: Example) -> bool:
    try:
        renderer.sample(example)
    except DataError:
        return False
    return True
