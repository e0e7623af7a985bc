"""A matching model as the second judge of a retrieval: it reads each candidate's picture and text together.

evaluate(clip, pairs, matcher=matcher(vilt, pairs), candidates=128)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.eval.retrieval import Matcher, Pairs
from chiasm.nn.modes import evaluating


def matcher(vlm: Any, pairs: Pairs, batch: int = 32) -> Matcher:
    """What ``retrieval.evaluate`` asks about its first candidates, by ``vlm.model.match``.

    Batches of ViLT hold pictures of several sizes, which changes nothing: padding cannot be seen. Raises ConfigError
    for a model that matches nothing.
    """
    if not callable(getattr(vlm.model, "match", None)):
        raise ConfigError(
            f"a model of type {vlm.config.model.type!r} does not judge pairs; re-rank with one that has match(batch)"
        )

    @torch.no_grad()
    def judge(images: Sequence[int], texts: Sequence[int]) -> Tensor:
        found = []
        with evaluating(vlm.model):
            for start in range(0, len(images), batch):
                rows = list(zip(images[start : start + batch], texts[start : start + batch], strict=True))
                talks = [_pair(pairs.images[i], pairs.texts[t]) for i, t in rows]
                made = vlm.processor.batch(talks, ids=[f"picture {i}, text {t}" for i, t in rows])
                found.append(vlm.model.match(made.to(vlm.device, dtype=vlm.dtype)).float().cpu())
        return torch.cat(found) if found else torch.zeros(0)

    return judge


def _pair(image: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
