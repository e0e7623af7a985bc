"""The image-use meter: the loss of a probe with its own pictures and with those of other examples.

A loss that falls says nothing about looking: answers can be guessed from questions. The meter takes the same questions
and answers twice and exchanges only the pictures. Where the two losses are equal, the model does not look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from chiasm.data.base import Example, with_answer
from chiasm.data.loader import Renderer
from chiasm.data.shuffle import shuffled
from chiasm.train.objectives.next_token import owners

SHARE = 0.02
"""The share of the loss that the pictures must be worth for the model to count as looking."""

SIGMAS = 3.0
"""Standard errors by which the gain must exceed 0."""

FEWEST = 8
"""Examples with exchanged pictures below which nothing is said."""


@dataclass(frozen=True)
class Reading:
    """Mean loss per answer token, in nats, of ``samples`` examples with true and with exchanged pictures.

    ``error`` is the standard error of ``gain``, the mean over examples of (shuffled - true).
    """

    true: float
    shuffled: float
    error: float
    samples: int

    @property
    def gain(self) -> float:
        """What the right picture is worth: nats per answer token."""
        return self.shuffled - self.true

    @property
    def verdict(self) -> str:
        """``looks``, ``blind``, or ``unknown`` where the probe is too small."""
        if self.samples < FEWEST:
            return "unknown"
        return "looks" if self.gain > max(SIGMAS * self.error, SHARE * self.true) else "blind"

    def told(self) -> str:
        """In one sentence."""
        numbers = (
            f"loss {self.true:.3f} with its own pictures, {self.shuffled:.3f} with others' "
            f"(gain {self.gain:+.3f} ± {self.error:.3f} nats a token, {self.samples} examples)"
        )
        if self.verdict == "unknown":
            return f"Image use unknown: {self.samples} examples could be given another's pictures, {FEWEST} are needed"
        does = "uses its pictures" if self.verdict == "looks" else "does NOT look at its pictures"
        return f"The model {does}: {numbers}"

    def record(self) -> dict[str, Any]:
        """For the log."""
        numbers = {"true": self.true, "shuffled": self.shuffled, "gain": self.gain, "error": self.error}
        return {f"image_use/{k}": v for k, v in (numbers | {"samples": self.samples}).items()} | {
            "image_use/verdict": self.verdict
        }


class Meter:
    """Reads the image use of a model on ``examples``; those without media are left out, as they cannot tell."""

    def __init__(self, model: Any, renderer: Renderer, examples: Sequence[Example], batch: int, seed: int = 0):
        self.model, self.batch = model, batch
        self.renderer = Renderer(renderer.processor, renderer.max_length)
        answered = [with_answer(example) for example in examples]
        self.mixed = shuffled(answered, seed)
        true = {(e.source, e.id): e for e in answered}
        self.true = [true[e.source, e.id] for e in self.mixed]

    @torch.no_grad()
    def __call__(self) -> Reading | None:
        """The reading; None where no example could be given another's pictures. The model is in eval mode."""
        if not self.mixed:
            return None
        own, other = self._losses(self.true), self._losses(self.mixed)
        gains = [(b - a) / n for (a, n), (b, _) in zip(own, other, strict=True)]
        mean = sum(gains) / len(gains)
        spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1))
        true = sum(a / n for a, n in own) / len(own)
        return Reading(true, true + mean, spread / math.sqrt(len(gains)), len(gains))

    def _losses(self, examples: list[Example]) -> list[tuple[float, int]]:
        """Loss sum and answer tokens of each example."""
        found: list[tuple[float, int]] = []
        for start in range(0, len(examples), self.batch):
            batch = self.renderer.batch(examples[start : start + self.batch])
            batch = batch.to(self.model.device, dtype=self.model.dtype)
            output = self.model(batch, logits="labels")
            losses = cross_entropy(output.logits.float(), output.targets, reduction="none")  # [n]
            rows = owners(batch, output)
            sums = torch.zeros(len(batch.ids), device=losses.device).index_add(0, rows, losses)
            counts = torch.bincount(rows, minlength=len(batch.ids))
            found += list(zip(sums.tolist(), [max(1, c) for c in counts.tolist()], strict=True))
        return found
