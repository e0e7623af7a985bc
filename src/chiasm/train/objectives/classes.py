"""Answers as classes: one right class, or soft scores as VQA has them.

References: ``nlvr2`` and ``vqa`` of dandelin/ViLT 762fd39, whose losses BEiT-3 and VLMo use too: cross-entropy, and the
binary cross-entropy of every class, summed over classes and averaged over samples.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F

from chiasm.errors import DataError
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.types import Batch


class ClassesConfig(ObjectiveConfig):
    """``scores``: ``one`` right class for a sample, or ``soft`` for scores from 0 to 1 of each."""

    type: str = "classes"
    scores: Literal["one", "soft"] = "one"


@register("objective", "classes")
class Classes:
    """The loss of a head over classes, summed over samples."""

    Config = ClassesConfig

    def __init__(self, config: ClassesConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over samples; logs the mean score of the class that is chosen. Raises DataError without labels."""
        if batch.scores is None:
            raise DataError(
                f"sample {batch.ids[0]!r}: has no answer to learn: set processing.labels, and give samples an "
                "assistant turn that is one of them"
            )
        logits = model.classify(batch).float()  # [B, C]
        if self.config.scores == "soft":
            total = F.binary_cross_entropy_with_logits(logits, batch.scores, reduction="sum")
        else:
            total = F.cross_entropy(logits, batch.scores.argmax(1), reduction="sum")
        hits = batch.scores.gather(1, logits.argmax(1, keepdim=True)).sum()
        return Loss(total, len(logits), {"accuracy": (hits, len(logits))})
