"""Masked language modelling beside a picture: words that were hidden are read off the states of the rest.

Papers: BERT (arXiv:1810.04805), ViLT (arXiv:2102.03334). Which words are hidden is decided where samples are made
(``processing.masking``), so that a run that was interrupted hides the same ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.fusion.pair import PairModel, Words, words_of
from chiasm.registry import register
from chiasm.train.objectives.base import Loss
from chiasm.train.objectives.cross_entropy import cross_entropy
from chiasm.types import Batch


@register("objective", "masked_words")
def masked_words(model: Any, batch: Batch) -> Loss:
    """Cross-entropy of the hidden words, summed; the weight is how many there are."""
    total, count = words_loss(model, batch)
    return Loss(total, count)


def words_loss(model: PairModel, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the losses ``[]`` and the number of hidden words; texts alone go the way of texts, where there is one.

    That is VLMo's stage on text.
    """
    alone: Any = getattr(model, "text_states", None)
    if not batch.media and alone is not None:
        states = alone(hidden_words(batch))  # [B, T, D], with VLMo a pair
        return at_hidden(model, states[0] if isinstance(states, tuple) else states, batch)
    _, pictures = model.read(batch)
    joint = model.joint(hidden_words(batch), pictures[0])
    return at_hidden(model, joint.hidden[:, joint.words], batch)


def at_hidden(model: PairModel, states: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """``states [B, T, D]`` of words → the sum of the losses of the hidden ones ``[]``, and how many those are."""
    assert batch.masked is not None
    total, losses = cross_entropy(states[batch.masked], batch.input_ids[batch.masked], model.word_head)
    return total, losses.numel()


def hidden_words(batch: Batch) -> Words:
    """The texts with what stands in the places of hidden words. Raises ConfigError where none was hidden."""
    if batch.masked_ids is None or batch.masked is None:
        raise ConfigError(
            "this objective fills hidden words, and the batch hides none: set processing.masking (share, whole_words), "
            "and make the batch with train=True"
        )
    return Words(batch.masked_ids, words_of(batch).mask)
