"""ALBEF's pre-training: contrast with a queue, hard matching, masked words, the first and last taught by the follower.

Paper: ALBEF (arXiv:2107.07651). Reference: ``model_pretrain.py`` of salesforce/ALBEF b9727e4; the formulas written out
in float64, ``tests/parity/test_albef_objective.py``.

    contrast   targets y = α softmax(s') + (1 - α) onehot over [the batch | the queue], s' the follower's scores
    matching   every pair, each text with a wrong picture, each picture with a wrong text
    words      (1 - α) CE(hidden words) + α CE(the follower's distribution)

Differences by design: each part is a mean over the micro-batch, and the loss their sum weighted by samples, so several
micro-batches are averaged; the follower moves and the queues are filled in training only, never in an evaluation; which
words are hidden is decided where samples are made. A batch may have any size up to the queue's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.albef import ALBEF
from chiasm.fusion.pair import Words
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.contrastive import picture_keys
from chiasm.train.objectives.masked_words import hidden_words
from chiasm.train.objectives.matching import hard_negatives
from chiasm.types import Batch

COLDEST, WARMEST = 0.001, 0.5


class AlbefConfig(ObjectiveConfig):
    """``alpha``: the follower's share in the targets, reached after ``ramp`` micro-batches, linearly from 0 (ALBEF: 0.4
    after the first epoch). ``words`` false: without masked words (fine-tuning for retrieval).
    """

    type: str = "albef"
    alpha: float = Field(default=0.4, ge=0, le=1)
    ramp: int = Field(default=0, ge=0)
    words: bool = True


@register("objective", "albef")
class AlbefLoss:
    """The sum of the three parts, times the number of samples."""

    Config = AlbefConfig

    def __init__(self, config: AlbefConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over samples. Raises ConfigError for a model without follower, queues, or one of the heads."""
        if not isinstance(model, ALBEF) or model.follower is None or model.temperature is None:
            raise ConfigError(f"objective 'albef' trains an albef model with momentum, got {model.config.type}")
        learns = model.training and torch.is_grad_enabled()
        alpha = self.config.alpha
        if self.config.ramp:
            alpha *= min(1.0, float(model.followed) / self.config.ramp)
        parts = losses(model, batch, alpha, learns, self.config.words)
        count = len(batch.input_ids)
        logged = {name: (part.detach() * count, count) for name, part in parts.items()}
        return Loss(torch.stack(list(parts.values())).sum() * count, count, logged)


def losses(model: ALBEF, batch: Batch, alpha: float, learns: bool, fills: bool = True) -> dict[str, Tensor]:
    """``contrast``, ``matching`` and (``fills``) ``words``, each a mean ``[]``, in the reference's order."""
    follower, body = model.follower, model.body
    assert follower is not None and model.temperature is not None
    if learns:
        with torch.no_grad():
            model.temperature.clamp_(COLDEST, WARMEST)
    words, pictures = model.read(batch)
    image, text = body.image_states(pictures[0]), body.text_states(words)  # [B, N, D_v], [B, T, D]
    with torch.no_grad():
        if learns:
            model.follow()
        image_m, text_m = follower.image_states(pictures[0]), follower.text_states(words)
        vectors_m = follower.image_vectors(image_m), follower.text_vectors(text_m)  # [B, E] each
    vectors = body.image_vectors(image), body.text_vectors(text)
    keys = picture_keys(batch) if model.config.momentum and model.config.momentum.pictures else None  # [B]
    right = same_picture(model, keys)  # [B, B + Q]
    contrast, scores = contrasted(model, vectors, vectors_m, alpha, right)
    if learns:
        model.enqueue(*vectors_m, keys)
    twins = None if right is None else right[:, : len(image)]  # [B, B]
    found = {"contrast": contrast, "matching": matching_part(model, words, text, image, scores, twins)}
    return found | ({"words": words_part(model, batch, words, image, image_m, alpha)} if fills else {})


def same_picture(model: ALBEF, keys: Tensor | None) -> Tensor | None:
    """``keys [B]`` of pictures → which of the batch and the queue ``[B, B + Q]`` have that picture; None: unasked."""
    return None if keys is None else keys[:, None] == torch.cat((keys, model.queue_keys))


def contrasted(
    model: ALBEF,
    vectors: tuple[Tensor, Tensor],
    taught: tuple[Tensor, Tensor],
    alpha: float,
    right: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss ``[]``, and the scores of the batch's pictures among its texts, and the other way round, ``[B, B]``.

    ``right [B, B + Q]`` share the hard targets alike; None: each sample's own is the only one.
    """
    count = len(vectors[0])
    columns = torch.cat((taught[1], model.text_queue)), torch.cat((taught[0], model.image_queue))  # [B + Q, E] each
    parts, scores = [], []
    for side in (0, 1):  # pictures among texts, texts among pictures
        logits = model.scale() * vectors[side] @ columns[side].T  # [B, B + Q]
        with torch.no_grad():
            soft = (model.scale() * taught[side] @ columns[side].T).softmax(1)
            hard = torch.zeros_like(soft).fill_diagonal_(1) if right is None else right / right.sum(1, keepdim=True)
            targets = alpha * soft + (1 - alpha) * hard
        parts.append(-(logits.log_softmax(1) * targets).sum(1).mean())
        scores.append(logits[:, :count].detach())
    return (parts[0] + parts[1]) / 2, (scores[0], scores[1])


def matching_part(
    model: ALBEF,
    words: Words,
    text: Tensor,
    image: Tensor,
    scores: tuple[Tensor, Tensor],
    twins: Tensor | None = None,
) -> Tensor:
    """Cross-entropy ``[]`` over right pairs and hard wrong ones, fused from the states that are there already.

    ``twins [B, B]``: samples of one picture, none of which is wrong for the other.
    """
    wrong_image, wrong_text = hard_negatives(*scores, *([] if twins is None else [twins]))
    own = torch.arange(len(text), device=text.device)
    texts, images = torch.cat((own, own, wrong_text)), torch.cat((own, wrong_image, own))
    fused = model.body.fuse(text[texts], words.mask[texts], [image[images]])  # [3 B, T, D]
    if model.match_scores is None:
        raise ConfigError("objective 'albef' needs the matching head; set model.tasks.match")
    right = (torch.arange(len(texts), device=text.device) < len(own)).long()
    return F.cross_entropy(model.match_scores(fused[:, 0]).float(), right)


def words_part(model: ALBEF, batch: Batch, words: Words, image: Tensor, image_m: Tensor, alpha: float) -> Tensor:
    """The mean loss ``[]`` of the hidden words, with the follower's distribution as the softer target."""
    masked = hidden_words(batch)
    assert batch.masked is not None
    if not bool(batch.masked.any()):
        return image.sum() * 0.0
    follower = model.follower
    assert follower is not None

    def logits(body: Any, picture: Tensor) -> Tensor:
        states = body.fuse(body.text_states(masked), words.mask, [picture])  # [B, T, D]
        return model.word_head(states[batch.masked], body).float()  # [n, V]

    found = logits(model.body, image).log_softmax(1)
    with torch.no_grad():
        taught = logits(follower, image_m).softmax(1)
    right = F.nll_loss(found, batch.input_ids[batch.masked])
    return (1 - alpha) * right - alpha * (taught * found).sum(1).mean()
