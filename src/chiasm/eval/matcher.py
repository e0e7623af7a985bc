"""A matching model as the second judge of a retrieval: it reads each candidate's picture and text together.

    evaluate(clip, pairs, matcher=matcher(vilt, pairs), candidates=128)

Reference: ALBEF b9727e4 ``Retrieval.py`` (the matching head's logit of "matches", of 256 candidates on COCO and 128 on
Flickr30k) and salesforce/LAVIS 506965b ``compute_sim_matrix`` (BLIP-2 adds the pair's cosine; 128 candidates). A
picture is opened once for all of its texts, and its states are computed once where a model first looks at it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.eval.retrieval import Matcher, Pairs
from chiasm.infer.embed import conversation
from chiasm.nn.modes import evaluating
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.types import Image, Message, Text

Advance = Callable[[int, int], None]


def matcher(vlm: Any, pairs: Pairs, batch: int = 32, advance: Advance | None = None) -> Matcher:
    """What ``retrieval.evaluate`` asks about its first candidates, by ``vlm.model.match`` or ``see`` and ``judge``.

    Batches of ViLT hold pictures of several sizes, which changes nothing: padding cannot be seen. ``advance(done, of)``
    is told of pairs. Raises ConfigError for a model that matches nothing.
    """
    model = vlm.model
    score = _apart if callable(getattr(model, "judge", None)) else _together
    if score is _together and not callable(getattr(model, "match", None)):
        raise ConfigError(
            f"a model of type {vlm.config.model.type!r} does not judge pairs; re-rank with one that has match(batch)"
        )

    @torch.no_grad()
    def judge(images: Sequence[int], texts: Sequence[int]) -> Tensor:
        found: list[Tensor] = []
        opened: dict[int, Any] = {}
        with evaluating(model):
            for start in range(0, len(images), batch):
                rows = list(zip(images[start : start + batch], texts[start : start + batch], strict=True))
                opened = {i: opened.get(i) for i, _ in rows}  # those of the batch before stay
                found.append(score(vlm, pairs, rows, opened).float().cpu())
                if advance:
                    advance(start + len(rows), len(images))
        return torch.cat(found) if found else torch.zeros(0)

    return judge


def _together(vlm: Any, pairs: Pairs, rows: Sequence[tuple[int, int]], opened: dict[int, Any]) -> Tensor:
    """``[B]`` of a model that reads picture and text in one; ``opened`` keeps the pictures."""
    front = vlm.processor.config.media["image"]
    for i in (i for i, picture in opened.items() if picture is None):
        opened[i] = open_picture(pairs.images[i], Place(f"picture {i}", 0, 1), front.max_pixels, front.alpha)
    talks = [[Message("user", (Image(opened[i]), Text(pairs.texts[t])))] for i, t in rows]
    made = vlm.processor.batch(talks, ids=[f"picture {i}, text {t}" for i, t in rows])
    return vlm.model.match(made.to(vlm.device, dtype=vlm.dtype))  # type: ignore[no-any-return]


def _apart(vlm: Any, pairs: Pairs, rows: Sequence[tuple[int, int]], opened: dict[int, Any]) -> Tensor:
    """``[B]`` of a model that looks at the picture first; ``opened`` keeps what it saw."""
    new = [i for i, states in opened.items() if states is None]
    if new:
        talks = [conversation(pairs.images[i], "image") for i in new]
        made = vlm.processor.batch(talks, ids=[f"picture {i}" for i in new]).to(vlm.device, dtype=vlm.dtype)
        opened.update(zip(new, vlm.model.see(made), strict=True))
    said = [conversation(pairs.texts[t], "text", vlm.processor.template) for _, t in rows]
    texts = vlm.processor.batch(said, ids=[f"text {t}" for _, t in rows]).to(vlm.device, dtype=vlm.dtype)
    return vlm.model.judge(torch.stack([opened[i] for i, _ in rows]), texts)  # type: ignore[no-any-return]
