"""Text assignment: which of two pictures does a text belong to, the first, the second, or neither?

Paper: ALBEF (arXiv:2107.07651), the pass between its pre-training and NLVR2, by which a model with doubled fusion
layers learns to tell its two pictures apart. Reference: ``model_pretrain_nlvr.py`` of salesforce/ALBEF b9727e4: in a
third of the cases neither, the wrong pictures drawn by their likeness to the right one.

Differences by design: 1e-4 is added to every share that a wrong picture is drawn with, or a row whose shares round to
nothing could not be drawn from. Draws come from torch's generator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.pair import name_of, pictures_of, words_of
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.types import Batch

NEITHER = 1 / 3


class AssignmentConfig(ObjectiveConfig):
    """``temperature`` divides the cosines of pictures."""

    type: str = "text_assignment"
    temperature: float = 0.07


@register("objective", "text_assignment")
class Assignment:
    """Cross-entropy of the three answers, summed over samples. For ALBEF with ``images: 2`` and ``assign: true``."""

    Config = AssignmentConfig

    def __init__(self, config: AssignmentConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Samples of one picture and its text. Raises ConfigError for another model, DataError for fewer than 3."""
        if getattr(model, "assign_scores", None) is None:
            raise ConfigError("text_assignment needs an albef model with images: 2, assign: true and contrast")
        words, pictures = words_of(batch), pictures_of(batch, 1)[0]
        if len(words.ids) < 3:
            raise DataError(
                f"sample {name_of(batch, 0)!r}: is in a batch of {len(words.ids)}; two wrong pictures beside each "
                "right one need at least 3"
            )
        states = model.body.image_states(pictures)  # [B, N, D_vision]
        with torch.no_grad():
            vectors = model.body.image_vectors(states)  # [B, E]
            first, second, right = assigned(vectors @ vectors.T / self.config.temperature)  # [B] each
        text = model.body.text_states(words)  # [B, T, D]
        hidden = model.body.fuse(text, words.mask, [states[first], states[second]])  # [B, T, D]
        logits = model.assign_scores(hidden[:, 0]).float()  # [B, 3]
        hits = (logits.argmax(1) == right).sum()
        return Loss(F.cross_entropy(logits, right, reduction="sum"), len(right), {"accuracy": (hits, len(right))})


def assigned(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Likeness of pictures ``[B, B]`` → the first and the second picture of each text, and the right answer, ``[B]``:
    0 and 1: the text's own is the first or the second; 2: neither is.
    """
    count = len(scores)
    shares = (scores.softmax(1) + 1e-4).fill_diagonal_(0)  # [B, B]
    wrong = torch.multinomial(shares, 2)  # [B, 2]
    own, device = torch.arange(count, device=scores.device), scores.device
    neither = torch.rand(count, device=device) < NEITHER  # [B]
    behind = torch.rand(count, device=device) < 0.5  # [B]: the text's own picture is the second
    first = torch.where(neither | behind, wrong[:, 0], own)
    second = torch.where(neither, wrong[:, 1], torch.where(behind, own, wrong[:, 0]))
    return first, second, torch.where(neither, 2, behind.long())


__all__ = ["Assignment", "assigned"]
