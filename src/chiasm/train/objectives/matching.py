"""Image-text matching: does this text belong to this picture, against others of the batch that nearly fit.

Papers: ViLT (arXiv:2102.03334) with negatives drawn evenly, ALBEF (arXiv:2107.07651) with hard ones: the more a wrong
picture looks right to the two towers, the likelier it is drawn. References: ``compute_itm_wpa`` of dandelin/ViLT
762fd39, ``model_pretrain.py`` of salesforce/ALBEF b9727e4.

Differences by design: negatives come from the micro-batch (ViLT draws them from the data set, VLMo from all ranks);
hard ones are drawn with 1e-4 added to every share, which ALBEF's retrieval code does and its pre-training code does
not: without it a row whose shares round to nothing cannot be drawn from.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import DataError
from chiasm.fusion.pair import Joint, PairModel, Pictures, Words
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.types import Batch


class MatchingConfig(ObjectiveConfig):
    """``negatives``: ``even`` makes half of the batch wrong; ``hard`` adds to every pair a wrong picture and a wrong
    text, drawn by the model's own cosines (it must have them).
    """

    type: str = "matching"
    negatives: Literal["even", "hard"] = "hard"


@register("objective", "matching")
class Matching:
    """Cross-entropy of "matches" and "does not", summed over samples."""

    Config = MatchingConfig

    def __init__(self, config: MatchingConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over the samples of their mean loss; its weight is the number of samples."""
        words, pictures = model.read(batch)
        if self.config.negatives == "even":
            joint, right = half_wrong(model, words, pictures[0])
            logits = model.match_logits(joint)
        else:
            scores = model.scale() * model.embed_images(batch) @ model.embed_texts(batch).T
            logits, right = with_hard(model, words, pictures[0], scores.detach())
        return matched(logits, right, len(words.ids))


def matched(logits: Tensor, right: Tensor, samples: int) -> Loss:
    """``logits [n, 2]``, ``right [n]`` bool → the mean loss times ``samples``; the share that is judged right."""
    loss = F.cross_entropy(logits.float(), right.long())
    hits = (logits.argmax(1) == right.long()).float().mean()
    return Loss(loss * samples, samples, {"matching/accuracy": (hits * samples, samples)})


def half_wrong(model: PairModel, words: Words, pictures: Pictures) -> tuple[Joint, Tensor]:
    """Joint states where every other sample, in an order drawn anew, has the picture of another; which are right."""
    count = len(words.ids)
    several(count)
    right = torch.zeros(count, dtype=torch.bool)
    right[: count // 2] = True
    right = right[torch.randperm(count)]  # [B]
    shift = torch.randint(1, count, (count,))
    rows = torch.where(right, torch.arange(count), (torch.arange(count) + shift) % count)
    return model.joint(words, pictures.pick(rows)), right.to(words.ids.device)


def with_hard(model: PairModel, words: Words, pictures: Pictures, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[3 B, 2]`` of the pairs, of each text with a wrong picture and of each picture with a wrong text."""
    image_rows, text_rows = hard_negatives(scores)
    own = torch.arange(len(words.ids), device=scores.device)
    texts, images = torch.cat((own, own, text_rows)), torch.cat((own, image_rows, own))
    joint = model.joint(words.pick(texts), pictures.pick(images))
    return model.match_logits(joint), torch.arange(len(texts), device=scores.device) < len(own)


def hard_negatives(images: Tensor, texts: Tensor | None = None, never: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A wrong picture for each text ``[B]`` and a wrong text for each picture ``[B]``.

    ``images [B, B]`` scores all pictures with all texts, ``texts [B, B]`` all texts with all pictures (None: the same).
    ``never [B, B]`` are not drawn, unless a row has no other.
    """
    several(len(images))

    def drawn(rows: Tensor) -> Tensor:
        shares = (rows.float().softmax(1) + 1e-4).fill_diagonal_(0)
        if never is not None:
            allowed = shares.masked_fill(never, 0)
            shares = torch.where(allowed.sum(1, keepdim=True) > 0, allowed, shares)
        return torch.multinomial(shares, 1)[:, 0]

    return drawn(images.T if texts is None else texts), drawn(images)


def several(count: int) -> None:
    """Raises DataError unless a micro-batch of ``count`` samples has others to compare with."""
    if count < 2:
        raise DataError(
            f"matching compares a sample with others of its micro-batch, which holds {count}; set batch_size to at "
            "least 2, and a number of samples that leaves no rest of 1"
        )
