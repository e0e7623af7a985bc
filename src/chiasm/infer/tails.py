"""The distributions at the end of some prompts: what a change of weights is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.nn.modes import evaluating

POSITIONS = 64


@torch.inference_mode()
def tail_logits(model: Any, processor: Any, prompts: Sequence[Any], positions: int = POSITIONS) -> list[Tensor]:
    """Logits ``[n, V]`` float32 of at most the last ``positions`` positions of each conversation.

    A conversation that ends with an answer is read as it is, so that the answer's own tokens are judged. Raises
    ConfigError for an encoder-decoder model.
    """
    if getattr(model, "lm", None) is None or model.lm.encoder_decoder:
        raise ConfigError(f"{type(model).__name__}: distributions are compared for models with a causal language model")
    found = []
    with evaluating(model):
        for conversation in prompts:
            last = conversation[-1]
            answered = (last["role"] if isinstance(last, dict) else last.role) == "assistant"
            batch = processor.batch([conversation], add_generation_prompt=not answered)
            output = model(batch.to(model.device, model.dtype), logits=None)
            found.append(model.lm.head(output.hidden[0, -positions:]).float())
    return found


__all__ = ["tail_logits"]
