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
from chiasm.eval.retrieval import Pairs
from chiasm.infer.embed import conversation
from chiasm.nn.modes import evaluating
from chiasm.processing.base import Place
from chiasm.processing.open import open_picture
from chiasm.types import Batch, Image, Message, Text

Advance = Callable[[int, int], None]
Rows = Sequence[tuple[int, int]]


def matcher(vlm: Any, pairs: Pairs, batch: int = 32, advance: Advance | None = None) -> Judge:
    """What ``retrieval.evaluate`` asks about its first candidates. ConfigError for a model that matches nothing."""
    return Judge(vlm, pairs, batch, advance)


class Judge:
    """Scores of pairs by ``vlm.model.match``, or ``see`` and ``judge`` of a model that looks at the picture first.

    Batches of ViLT hold pictures of several sizes, which changes nothing: padding cannot be seen. ``advance(done, of)``
    is told of pairs. ``shortened``: the texts that were longer than the model reads, and lost their end.
    """

    def __init__(self, vlm: Any, pairs: Pairs, batch: int = 32, advance: Advance | None = None):
        self.vlm, self.pairs, self.batch, self.advance = vlm, pairs, batch, advance
        self.shortened: set[int] = set()
        self.looks = callable(getattr(vlm.model, "judge", None))
        if not self.looks and not callable(getattr(vlm.model, "match", None)):
            raise ConfigError(
                f"a model of type {vlm.config.model.type!r} does not judge pairs; re-rank with one that has "
                "match(batch)"
            )

    @torch.no_grad()
    def __call__(self, images: Sequence[int], texts: Sequence[int]) -> Tensor:
        """Numbers of pictures ``[n]``, those of one after the other, and of texts ``[n]`` → ``[n]``."""
        found: list[Tensor] = []
        held: dict[int, Any] = {}
        score = self._apart if self.looks else self._together
        with evaluating(self.vlm.model):
            for start in range(0, len(images), self.batch):
                rows = list(zip(images[start : start + self.batch], texts[start : start + self.batch], strict=True))
                held = {i: held.get(i) for i, _ in rows}  # those of the batch before stay
                found.append(score(rows, held).float().cpu())
                if self.advance:
                    self.advance(start + len(rows), len(images))
        return torch.cat(found) if found else torch.zeros(0)

    def _together(self, rows: Rows, held: dict[int, Any]) -> Tensor:
        """``[B]`` of a model that reads picture and text in one; ``held`` keeps the pictures."""
        front = self.vlm.processor.config.media["image"]
        for i in (i for i, picture in held.items() if picture is None):
            held[i] = open_picture(self.pairs.images[i], Place(f"picture {i}", 0, 1), front.max_pixels, front.alpha)
        talks = [[Message("user", (Image(held[i]), Text(self.pairs.texts[t])))] for i, t in rows]
        return self.vlm.model.match(self._batch(talks, rows))  # type: ignore[no-any-return]

    def _apart(self, rows: Rows, held: dict[int, Any]) -> Tensor:
        """``[B]`` of a model that looks at the picture first; ``held`` keeps what it saw."""
        new = [i for i, states in held.items() if states is None]
        if new:
            pictures = [conversation(self.pairs.images[i], "image") for i in new]
            held.update(zip(new, self.vlm.model.see(self._batch(pictures, [(i, -1) for i in new])), strict=True))
        said = [conversation(self.pairs.texts[t], "text", self.vlm.processor.template) for _, t in rows]
        states = torch.stack([held[i] for i, _ in rows])  # [B, N, D]
        return self.vlm.model.judge(states, self._batch(said, rows))  # type: ignore[no-any-return]

    def _batch(self, talks: Sequence[Any], rows: Rows) -> Batch:
        samples = [
            self.vlm.processor(talk, id=f"picture {i}, text {t}") for talk, (i, t) in zip(talks, rows, strict=True)
        ]
        self.shortened.update(t for sample, (_, t) in zip(samples, rows, strict=True) if sample.lost)
        return self.vlm.processor.collate(samples).to(self.vlm.device, dtype=self.vlm.dtype)  # type: ignore[no-any-return]
