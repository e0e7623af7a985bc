"""Captions learned by filling: most words are hidden, and each sees the picture and the words before it.

Paper: BEiT-3 (arXiv:2208.10442), after s2s-ft (arXiv:2110.13640). Reference: ``BEiT3ForCaptioning`` and
``BertCaptioningLoss`` of microsoft/unilm ``beit3`` 768a3c8.

``drop_worst`` leaves out the share of hidden words with the highest losses; the reference does so from iteration 12,000
on, which here is a stage of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from chiasm.errors import ConfigError
from chiasm.fusion.multiway import Multiway
from chiasm.registry import register
from chiasm.train.objectives.base import Loss, ObjectiveConfig
from chiasm.train.objectives.masked_words import hidden_words
from chiasm.types import Batch


class CaptionConfig(ObjectiveConfig):
    """``smoothing``: the share of the target that goes to all other words alike. ``drop_worst``: see the module."""

    type: str = "masked_captions"
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    drop_worst: float = Field(default=0.0, ge=0, lt=1)


@register("objective", "masked_captions")
class MaskedCaptions:
    """The divergence of the smoothed target from what is said of each hidden word, summed over those that count."""

    Config = CaptionConfig

    def __init__(self, config: CaptionConfig):
        self.config = config

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """Summed over hidden words; the weight is how many count. Raises ConfigError for another kind of model."""
        if not isinstance(model, Multiway):
            raise ConfigError(f"objective 'masked_captions' trains a multiway model, got {model.config.type}")
        words, (pictures, *_) = hidden_words(batch), model.read(batch)[1]
        joint = model.joint(words, pictures, causal=True)
        assert batch.masked is not None
        states, right = joint.hidden[:, joint.words][batch.masked], batch.input_ids[batch.masked]  # [n, D], [n]
        each = smoothed(model.word_head(states).float().log_softmax(-1), right, self.config.smoothing)  # [n]
        kept = int(len(each) * (1 - self.config.drop_worst))
        if kept < len(each):
            each = each.topk(kept, largest=False).values
        return Loss(each.sum(), len(each))


def smoothed(log_shares: torch.Tensor, right: torch.Tensor, smoothing: float) -> torch.Tensor:
    """KL(target || shares) ``[n]`` for ``log_shares [n, V]`` and a target of ``1 - smoothing`` at ``right [n]``."""
    others = log_shares.shape[1] - 1
    at_right = log_shares.gather(1, right[:, None])[:, 0]
    rest = log_shares.sum(1) - at_right
    share = smoothing / others
    entropy = (1 - smoothing) * torch.log(torch.tensor(1 - smoothing)) if smoothing < 1 else torch.tensor(0.0)
    entropy = entropy + (others * share * torch.log(torch.tensor(share)) if smoothing > 0 else 0.0)
    return entropy.to(log_shares) - (1 - smoothing) * at_right - share * rest
