"""The published pre-trainings of ViLT and VLMo, put together from their parts.

Papers: ViLT (arXiv:2102.03334): masked words + matching + a tenth of word-patch alignment. VLMo (arXiv:2111.02358):
contrast by both routes, matching with hard negatives, and a quarter of masked words. References: ``objectives.py`` of
dandelin/ViLT 762fd39, and of microsoft/unilm ``vlmo`` 768a3c8.

Each part is a mean over the micro-batch; the loss is their sum weighted by samples. Samples are compared within a
micro-batch (VLMo: over all ranks), so contrast and hard negatives want a large ``batch_size``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.modality_experts import ModalityExperts
from chiasm.fusion.pair import Pictures, Words
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.masked_words import words_loss
from chiasm.train.objectives.matching import half_wrong, with_hard
from chiasm.train.objectives.word_patch import distances
from chiasm.types import Batch


class ViltConfig(ObjectiveConfig):
    """Weights of the parts; 0 leaves one out."""

    type: str = "vilt"
    words: float = Field(default=1.0, ge=0)
    matching: float = Field(default=1.0, ge=0)
    alignment: float = Field(default=0.1, ge=0)


@register("objective", "vilt")
class ViltLoss:
    """Masked words, matching, word-patch alignment."""

    Config = ViltConfig

    def __init__(self, config: ViltConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over samples."""
        c, parts = self.config, {}
        if c.words:
            total, count = words_loss(model, batch)
            parts["words"] = (c.words, total / max(1, count))
        if c.matching or c.alignment:
            words, pictures = model.read(batch)
            joint, right = half_wrong(model, words, pictures[0])
            if c.matching:
                parts["matching"] = (c.matching, F.cross_entropy(model.match_logits(joint).float(), right.long()))
            if c.alignment:
                signs = torch.where(right, 1.0, -1.0)
                parts["alignment"] = (c.alignment, (distances(joint) * signs).mean())
        return together(parts, len(batch.input_ids))


class VlmoConfig(ObjectiveConfig):
    """Weights of the parts; 0 leaves one out."""

    type: str = "vlmo"
    contrast: float = Field(default=1.0, ge=0)
    matching: float = Field(default=1.0, ge=0)
    words: float = Field(default=0.25, ge=0)


@register("objective", "vlmo")
class VlmoLoss:
    """Contrast by both routes, matching, masked words."""

    Config = VlmoConfig

    def __init__(self, config: VlmoConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over samples. Raises ConfigError for another kind of model."""
        if not isinstance(model, ModalityExperts):
            raise ConfigError(f"objective 'vlmo' trains a modality_experts model, got {model.config.type}")
        c, parts = self.config, {}
        words, pictures = model.read(batch)
        contrast, scores = contrasted(model, words, pictures[0])
        if c.contrast:
            parts["contrast"] = (c.contrast, contrast)
        if c.matching:
            logits, right = with_hard(model, words, pictures[0], scores)
            parts["matching"] = (c.matching, F.cross_entropy(logits.float(), right.long()))
        if c.words:
            total, count = words_loss(model, batch)
            parts["words"] = (c.words, total / max(1, count))
        return together(parts, len(batch.input_ids))


def contrasted(model: ModalityExperts, words: Words, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """The mean ``[]`` of the contrastive losses of both routes, and the first one's scores ``[I, B]``."""
    both = model.config.contrast_both
    images, texts = model.image_states(pictures, both), model.text_states(words, both)
    scores = model.scale() * model.vectors(images[0], "image") @ model.vectors(texts[0], "text").T  # [I, B]
    found = [either_way(scores)]
    if both and images[1] is not None and texts[1] is not None and model.logit_scale_both is not None:
        upper = model.vectors(images[1], "image_both") @ model.vectors(texts[1], "text_both").T
        found.append(either_way(model.logit_scale_both.exp() * upper))
    return torch.stack(found).mean(), scores.detach()


def either_way(scores: Tensor) -> Tensor:
    """½ (CE of pictures among texts + CE of texts among pictures), a mean ``[]``."""
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def together(parts: dict[str, tuple[float, Tensor]], samples: int) -> Loss:
    """Weighted means as a sum over ``samples``. Raises ConfigError where all weights are 0."""
    if not parts:
        raise ConfigError("every weight of the objective is 0; give one of its parts a weight")
    total = torch.stack([weight * part for weight, part in parts.values()]).sum()
    logged = {name: (part.detach() * samples, samples) for name, (_, part) in parts.items()}
    return Loss(total * samples, samples, logged)
