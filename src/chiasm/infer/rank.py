"""Which of several answers a model finds most likely: visual question answering and classification without generating.

    log p(answer | prompt) = Σ log p(token | prompt, tokens before), over the answer's tokens and its end

Paper: BLIP-2 (arXiv:2301.12597) and InstructBLIP (arXiv:2305.06500) answer closed questions so. Reference:
``predict_class`` of salesforce/LAVIS 506965b. There a T5 is ranked by the sum and a Llama by the mean over its tokens,
padding included; a sum favours short answers, a mean long ones. Here both are there by name; padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.errors import ConfigError, DataError, NumberError
from chiasm.fusion.base import Fusion
from chiasm.nn.modes import evaluating
from chiasm.processing.messages import parse
from chiasm.types import Batch, Message, Text, Tokens

By = Literal["sum", "mean"]


@dataclass(frozen=True)
class Ranked:
    """One candidate. ``log_probability`` sums over its ``tokens`` (its end is one of them); ``score`` is what is ranked
    by: that sum, or its mean.
    """

    text: str
    score: float
    log_probability: float
    tokens: int


def rank(
    model: Fusion,
    processor: Any,
    messages: Sequence[Any],
    candidates: Sequence[str],
    by: By = "sum",
    batch_size: int = 64,
) -> list[Ranked]:
    """The candidates as answers to a conversation, the most likely first; equal ones keep their order.

    ``by``: "sum" is the likelihood of the whole answer, "mean" that of its tokens. Pictures are encoded once for each
    ``batch_size`` candidates. Raises DataError for no candidate, an empty or a repeated one, or a conversation that
    does not end with the user.
    """
    if by not in ("sum", "mean"):
        raise ConfigError(f"candidates are ranked by 'sum' or 'mean', not by {by!r}")
    asked = _asked(messages, candidates)
    found: list[tuple[float, int]] = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(candidates), batch_size):
            part = candidates[start : start + batch_size]
            talks = [[*asked, Message("assistant", (Text(text),))] for text in part]
            batch = processor.batch(talks, ids=[repr(text) for text in part], train=True, padding_side="right")
            found += likelihoods(model, batch.to(model.device, model.dtype))
    ranked = [
        Ranked(text, total if by == "sum" else total / count, total, count)
        for text, (total, count) in zip(candidates, found, strict=True)
    ]
    return sorted(ranked, key=lambda r: -r.score)


def likelihoods(model: Fusion, batch: Batch) -> list[tuple[float, int]]:
    """Of each row, the sum of the log-probabilities of its targets, and how many they are."""
    _look_once(model, batch)
    output = model(batch, logits="labels")
    assert output.logits is not None and output.targets is not None and output.target_rows is not None
    chances = output.logits.float().log_softmax(dim=-1)  # [n, V]
    each = chances.gather(1, output.targets.unsqueeze(1)).squeeze(1).double()  # [n]
    sums = each.new_zeros(len(batch.ids)).index_add(0, output.target_rows, each)  # [B]
    if bool(sums.isnan().any()):
        raise NumberError(
            "the likelihoods of the answers are NaN: in float16 the model's numbers may be too large (load it with "
            "dtype bfloat16 or float32), or a weight of it is broken"
        )
    counts = torch.bincount(output.target_rows, minlength=len(batch.ids))
    return list(zip(sums.tolist(), counts.tolist(), strict=True))


def _look_once(model: Any, batch: Batch) -> None:
    """The rows of the batch hold the same media: encoders run on those of the first row only."""
    media_config = getattr(model.config, "media", {})
    for kind, media in batch.media.items():
        names = getattr(media_config.get(kind), "encoders", None)
        rows = len(batch.ids)
        if names is None or media.features is not None or rows == 1:
            continue
        own = media.inputs[: len(media.inputs) // rows]  # units of the first row
        found = {name: model.encoders[name](own) for name in names}
        media.features = {name: _repeated(tokens, rows) for name, tokens in found.items()}


def _repeated(tokens: Tokens, rows: int) -> Tokens:
    def again(x: Tensor) -> Tensor:
        return x.repeat(rows, *[1] * (x.ndim - 1))

    return replace(tokens, x=again(tokens.x), mask=None if tokens.mask is None else again(tokens.mask))


def _asked(messages: Sequence[Any], candidates: Sequence[str]) -> list[Message]:
    """The conversation, in which no earlier answer counts."""
    if isinstance(candidates, str) or not candidates:
        raise DataError(f"rank needs a list of candidate answers, got {candidates!r}; give at least one")
    twice = next((text for i, text in enumerate(candidates) if text in candidates[:i]), None)
    if twice is not None:
        raise DataError(f"candidate {twice!r} stands twice in the list of {len(candidates)}; give each once")
    parsed = parse(messages, "rank")
    if not parsed or parsed[-1].role != "user":
        told = parsed[-1].role if parsed else "nobody"
        raise DataError(f"the conversation to rank answers for ends with {told!r}; its last turn must be the user's")
    return [replace(m, train=False) if m.role == "assistant" else m for m in parsed]


__all__ = ["Ranked", "likelihoods", "rank"]
