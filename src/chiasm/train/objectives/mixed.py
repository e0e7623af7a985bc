"""Pictures of a batch mixed in pairs, their classes likewise: mixup and cutmix.

Papers: mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899). Reference: ``Mixup`` of timm in its mode for whole batches,
which BEiT-3's and DeiT's recipes use: the first picture is mixed with the last, the second with the last but one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from chiasm.config import Config
from chiasm.errors import ConfigError
from chiasm.types import Batch


class Mixing(Config):
    """``mixup`` and ``cutmix``: both parameters of the Beta distribution that a share is drawn from (0: never); where
    both are given, cutmix is done with the chance ``switch``. ``chance``: of mixing a batch at all.
    """

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    switch: float = Field(default=0.5, ge=0, le=1)
    chance: float = Field(default=1.0, ge=0, le=1)

    def model_post_init(self, context: object) -> None:
        """Raises ConfigError where nothing would be mixed."""
        if not self.mixup and not self.cutmix:
            raise ConfigError("mixing: mixup and cutmix are both 0; give one of them, or leave mixing out")


def mixed(batch: Batch, scores: Tensor, how: Mixing) -> tuple[Batch, Tensor]:
    """A batch of pictures and their ``scores [B, C]`` → both mixed. Random numbers come from torch's generator.

    Raises ConfigError for samples with texts, or pictures of several sizes.
    """
    media = batch.media.get("image")
    if media is None or bool(batch.segment_ids.any()):
        raise ConfigError("mixing: these samples have texts, which say nothing of a mixture of pictures; leave it out")
    if media.features or media.owners != list(range(len(scores))) or len({x.shape for x in media.layouts}) > 1:
        raise ConfigError("mixing: needs one picture a sample, all of one size, and no feature_cache; leave it out")
    if len(scores) < 2 or float(torch.rand(())) >= how.chance:
        return batch, scores
    cut = bool(how.cutmix) and (not how.mixup or float(torch.rand(())) < how.switch)
    alpha = how.cutmix if cut else how.mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    x = media.inputs  # [B, 3, height, width]
    if cut:
        (top, bottom), (left, right) = _box(x.shape[-2], x.shape[-1], share)
        share = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
        inputs = x.clone()
        inputs[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
    else:
        inputs = share * x + (1 - share) * x.flip(0)
    changed = {**batch.media, "image": replace(media, inputs=inputs)}
    return replace(batch, media=changed), share * scores + (1 - share) * scores.flip(0)


def _box(height: int, width: int, share: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a part of the size ``1 - share`` around a random place, cut at the border."""
    spans = []
    for side in (height, width):
        half = int(side * math.sqrt(1 - share)) // 2
        middle = int(torch.randint(side, ()))
        spans.append((max(0, middle - half), min(side, middle + half)))
    return spans[0], spans[1]


__all__ = ["Mixing", "mixed"]
