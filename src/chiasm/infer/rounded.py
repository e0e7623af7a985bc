"""Weights of 8 or 4 bits, and what rounding them did to what the model gives.

told = quantize(model, processor, "int8", prompts=conversations)     # Quality: distributions of the next token
told = quantize(model, processor, "int8", images=[...], texts=[...])     # Nearness: vectors of two towers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chiasm.errors import ConfigError
from chiasm.infer.embed import embed
from chiasm.infer.tails import tail_logits
from chiasm.nn.quality import Nearness, Quality, nearness, quality
from chiasm.nn.quant import quantize_model


def quantize(
    model: Any,
    processor: Any,
    how: str,
    prompts: Sequence[Any] = (),
    images: Sequence[Any] = (),
    texts: Sequence[str] = (),
    names: str | None = None,
    keep: Sequence[str] = (),
) -> Quality | Nearness | None:
    """Round the weights of ``model`` in place (``chiasm.nn.quant.quantize_model``); what that did to ``prompts``, or to
    the vectors of ``images`` and ``texts``; None where nothing is given. Raises ConfigError.
    """
    given: list[dict[str, Any]] = [
        {kind: items} for kind, items in (("images", images), ("texts", texts)) if len(items)
    ]
    if prompts and given:
        raise ConfigError("give prompts (for a language model) or images and texts (for two towers), not both")
    before = tail_logits(model, processor, prompts) if prompts else []
    vectors = [embed(model, processor, **items) for items in given]
    quantize_model(model, how, names, keep)
    if prompts:
        return quality(before, tail_logits(model, processor, prompts))
    if not given:
        return None
    changed = [embed(model, processor, **items) for items in given]
    return nearness(torch.cat(vectors), torch.cat(changed))


__all__ = ["quantize"]
