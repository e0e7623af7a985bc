"""Answers as classes: one right class, or soft scores as VQA has them.

References: ``nlvr2`` and ``vqa`` of dandelin/ViLT 762fd39, whose losses BEiT-3 and VLMo use too: cross-entropy, and the
binary cross-entropy of every class, summed over classes and averaged over samples. Smoothing and mixtures as timm
has them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field

from chiasm.errors import ConfigError, DataError
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.mixed import Mixing, mixed
from chiasm.types import Batch


class ClassesConfig(ObjectiveConfig):
    """``scores``: ``one`` right class for a sample, or ``soft`` for scores from 0 to 1 of each.

    In training with one right class: ``smoothing`` of it is spread over all classes, ``mixing`` mixes pictures.
    """

    type: str = "classes"
    scores: Literal["one", "soft"] = "one"
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixing: Mixing | None = None

    def model_post_init(self, context: Any) -> None:
        """Raises ConfigError for soft scores that are smoothed or mixed."""
        if self.scores == "soft" and (self.smoothing or self.mixing):
            raise ConfigError("classes: smoothing and mixing are for scores: one; soft scores stand as they are")


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
        scores = batch.scores  # [B, C]
        softened = model.training and bool(self.config.smoothing or self.config.mixing)
        if softened:
            right, classes = F.one_hot(scores.argmax(1), scores.shape[1]).float(), scores.shape[1]
            scores = right * (1 - self.config.smoothing) + self.config.smoothing / classes
            if self.config.mixing is not None:
                batch, scores = mixed(batch, scores, self.config.mixing)
        logits = model.classify(batch).float()  # [B, C]
        if self.config.scores == "soft":
            total = F.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
        else:
            total = F.cross_entropy(logits, scores if softened else scores.argmax(1), reduction="sum")
        hits = scores.gather(1, logits.argmax(1, keepdim=True)).sum()
        return Loss(total, len(logits), {"accuracy": (hits, len(logits))})
