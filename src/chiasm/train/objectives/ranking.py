"""Ranking: a picture's own text must score above texts of other pictures, as ViLT is fine-tuned for retrieval.

Paper: ViLT (arXiv:2102.03334). Reference: ``compute_irtr`` of dandelin/ViLT 762fd39: cross-entropy over a picture's own
text and 15 others. Its configuration also names matching with a weight of 0.5, but tasks below 1 are not trained there
(``set_task``), so the ranking stands alone; the entry only builds the head that the ranking head starts from.

Difference by design: wrong texts come from the micro-batch, those of equal tokens left out (there: from the whole data
set); a micro-batch with fewer others takes them all.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.pair import PairModel
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.contrastive import text_keys
from chiasm.train.objectives.matching import several
from chiasm.types import Batch


class RankingConfig(ObjectiveConfig):
    """``wrong``: how many wrong texts a picture is shown with."""

    type: str = "ranking"
    wrong: int = Field(default=15, gt=0)


@register("objective", "ranking")
class Ranking:
    """Cross-entropy of the own text among others, summed over pictures."""

    Config = RankingConfig

    def __init__(self, config: RankingConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over samples. Raises ConfigError for a model without a score of pairs, DataError for a batch of 1."""
        rank = getattr(model, "rank", None)
        if not isinstance(model, PairModel) or rank is None:
            raise ConfigError(
                f"objective 'ranking' needs a model with a ranking head, got {model.config.type}: set model.tasks.rank "
                "where it has one, or use objective 'contrastive' or 'albef'"
            )
        words, pictures = model.read(batch)
        texts, allowed = others(text_keys(batch), self.config.wrong)  # [B, 1 + w] each
        count, width = texts.shape
        rows = torch.arange(count, device=texts.device).repeat_interleave(width)
        scores = rank(model.joint(words.pick(texts.flatten()), pictures[0].pick(rows))).view(count, width)
        scores = scores.float().masked_fill(~allowed, -torch.inf)
        loss = -scores.log_softmax(1)[:, 0].sum()
        hits = (scores.detach().argmax(1) == 0).sum()
        return Loss(loss, count, {"ranking/accuracy": (hits, count)})


def others(keys: Tensor, wrong: int) -> tuple[Tensor, Tensor]:
    """Rows of texts for each picture, its own first ``[B, 1 + w]``, and which count: ``w`` drawn without repetition of
    those whose key is not its own, at most ``wrong``.
    """
    several(len(keys))
    differs = keys[:, None] != keys[None, :]  # [B, B]
    noise = torch.rand(len(keys), len(keys), device=keys.device).masked_fill(~differs, -1.0)
    found, drawn = noise.topk(min(wrong, len(keys) - 1), dim=1)  # [B, w] each
    own = torch.arange(len(keys), device=keys.device)[:, None]  # [B, 1]
    return torch.cat((own, drawn), 1), torch.cat((torch.ones_like(own, dtype=torch.bool), found >= 0), 1)


__all__ = ["Ranking", "RankingConfig", "others"]
