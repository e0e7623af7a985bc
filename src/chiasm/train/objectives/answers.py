"""ALBEF's questions: a decoder writes what people answered, each answer weighed by how many people gave it.

Paper: ALBEF (arXiv:2107.07651), section on VQA. Reference: ``model_vqa.py`` and ``xbert.py`` of salesforce/ALBEF
b9727e4; the formula in float64, ``tests/parity/test_albef_answers.py``.

    loss of a question   Σ_k w_k Σ_s [(1 - α) · -log p(a_ks) - α Σ_v p'(v) log p(v)]

``w_k`` is the share of the people who gave answer ``k``, ``p`` the decoder's distribution at each place of the answer
after its first token, ``p'`` the follower's. The loss is summed over places and answers, and averaged over questions.

Differences by design: without a follower (``model.momentum`` null) there are no soft targets, as with the reference's
``distill: False``; the follower moves in training only, never in an evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.albef import ALBEF
from chiasm.fusion.pair import Pictures, Words
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.types import Answers, Batch


class AnswersConfig(ObjectiveConfig):
    """``alpha``: the follower's share in the targets, reached after ``ramp`` micro-batches, linearly from 0."""

    type: str = "albef_answers"
    alpha: float = Field(default=0.4, ge=0, le=1)
    ramp: int = Field(default=0, ge=0)


@register("objective", "albef_answers")
class AlbefAnswers:
    """The weighed losses of all answers, summed over questions."""

    Config = AnswersConfig

    def __init__(self, config: AnswersConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The sum over questions; its weight is how many those are. Raises ConfigError or DataError."""
        if not isinstance(model, ALBEF) or model.decoder is None:
            raise ConfigError(
                f"objective 'albef_answers' trains an albef model that writes answers, got {model.config.type}: set "
                "model.answer_depth, or use objective 'classes' with processing.labels"
            )
        if batch.answers is None:
            raise DataError(
                f"sample {batch.ids[0]!r}: has no answer to learn: set processing.answers, and give samples 'answers' "
                "or an assistant turn"
            )
        words, pictures = model.read(batch)
        logits = written(model, model.body, model.decoder, (words, pictures), batch.answers)  # [A, S-1, V]
        targets, counted = batch.answers.ids[:, 1:], batch.answers.mask[:, 1:]  # [A, S-1] each
        found = logits.float().log_softmax(-1)
        losses = -found.gather(2, targets[..., None])[..., 0]  # [A, S-1]
        alpha = self._share(model)
        if model.follower is not None and model.decoder_follower is not None:
            if model.training and torch.is_grad_enabled():
                model.follow()
            with torch.no_grad():
                taught = written(model, model.follower, model.decoder_follower, (words, pictures), batch.answers)
            soft = -(taught.float().softmax(-1) * found).sum(-1)  # [A, S-1]
            losses = (1 - alpha) * losses + alpha * soft
        each = (losses * counted).sum(1)  # [A]
        first = (logits[:, 0].argmax(-1) == targets[:, 0]).float() * batch.answers.shares  # [A]
        count = len(batch.input_ids)
        return Loss((each * batch.answers.shares).sum(), count, {"first_word": (first.detach().sum(), count)})

    def _share(self, model: ALBEF) -> float:
        """The follower's share now."""
        if model.follower is None or not self.config.ramp:
            return self.config.alpha
        return self.config.alpha * min(1.0, float(model.followed) / self.config.ramp)


def written(model: ALBEF, body: Any, decoder: Any, asked: tuple[Words, list[Pictures]], answers: Answers) -> Tensor:
    """Logits ``[A, S-1, V]`` of the words after each place of ``answers [A, S]``, but for the last."""
    words, pictures = asked
    images = [body.image_states(p) for p in pictures]
    question = body.fuse(
        body.text_states(words), words.mask, images * (model.config.images // len(images))
    )  # [B, T, D]
    rows = answers.owners
    return decoder(answers.ids, question[rows], words.mask[rows])[:, :-1]  # [A, S-1, V]


__all__ = ["AlbefAnswers", "AnswersConfig", "written"]
