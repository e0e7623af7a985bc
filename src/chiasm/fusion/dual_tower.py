"""Two towers: a picture and a text each become one vector of unit length, and what belongs together is close.

Papers: CLIP (arXiv:2103.00020), ALIGN (arXiv:2102.05918), SigLIP (arXiv:2303.15343). Reference: ``CLIPModel``,
``AlignModel`` and ``SiglipModel`` of transformers 5.23, equal to 1e-5 in float32.

Differences by design: pictures and texts need not be as many as each other; vectors and scores are float32 or wider
whatever the type of the model; the bound on the scale (100 in CLIP's paper) holds in evaluation by itself, and in
training because the loop puts the parameter back within ``scale_bounds`` after each step, as the published trainers do.

Letters: ``I`` pictures, ``B`` texts, ``D`` the width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm import registry
from chiasm.errors import ConfigError, DataError
from chiasm.fusion.assembly import check_pooled
from chiasm.fusion.base import Asked, Fusion
from chiasm.fusion.ragged import all_sizes
from chiasm.fusion.tower import TowerConfig
from chiasm.types import Batch, MediaBatch, Output, Tokens

TEXT = "text"
SILENT = (
    "a model of two towers compares pictures and texts and writes none: use embed or classify, or load a model that "
    "generates"
)


@registry.register("fusion", "dual_tower")
class DualTower(Fusion):
    """Encoder → connector → unit length, once for the medium and once for the text."""

    class Config(TowerConfig):
        """``encoders`` and ``connectors``: one of each for ``"text"`` and for one kind of media (``"image"``).

        ``scale`` multiplies cosines: the exponential of a parameter (CLIP, SigLIP) or one over it (ALIGN's
        temperature). ``scale_init`` is its first value as it multiplies, ``bias_init`` that of SigLIP's bias (None:
        there is none), ``max_scale`` its bound.
        """

        type: str = "dual_tower"
        dim: PositiveInt
        scale: Literal["log", "divisor"] = "log"
        scale_init: PositiveFloat = 1 / 0.07
        max_scale: PositiveFloat | None = 100.0
        bias_init: float | None = None

        @model_validator(mode="after")
        def _fits(self) -> DualTower.Config:
            for parts, what in ((self.encoders, "encoders"), (self.connectors, "connectors")):
                if TEXT not in parts or len(parts) != 2 or parts.keys() != self.encoders.keys():
                    raise ConfigError(
                        f"dual_tower: {what} are {', '.join(parts) or 'none'}; give two, {TEXT!r} and the kind of media"
                    )
            return self

        @property
        def kind(self) -> str:
            """The kind of media: what is not text."""
            return next(name for name in self.encoders if name != TEXT)

        @property
        def vocab(self) -> int | None:
            """Rows of the text tower's vocabulary."""
            return getattr(self.encoders[TEXT], "vocab", None)

    config: Config
    silent = SILENT

    def __init__(self, config: Config, encoders: Mapping[str, Any], connectors: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        if config.scale == "log":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(config.scale_init)))
        else:
            self.temperature = nn.Parameter(torch.tensor(1 / config.scale_init))
        self.logit_bias = None if config.bias_init is None else nn.Parameter(torch.tensor(float(config.bias_init)))

    @classmethod
    def compose(cls, config: Config) -> DualTower:
        """The model of a configuration. Raises ConfigError where parts do not fit each other."""
        encoders = {name: registry.get("encoder", c.type)(c) for name, c in config.encoders.items()}
        connectors = {
            name: registry.get("connector", c.type)(c, in_dims={name: encoders[name].dim}, out_dim=config.dim)
            for name, c in config.connectors.items()
        }
        return cls(config, encoders, connectors)

    def check_counts(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare counted with produced vectors of a unit (meta device). Raises ConfigError with both numbers."""
        for kind, shape in shapes.items():
            check_pooled(self, kind, shape)

    # ---------------------------------------------------------------------------------------------- vectors

    def embed_images(self, batch: Batch) -> Tensor:
        """The batch's pictures as vectors of unit length ``[I, D]``, float32 or wider. Raises DataError."""
        return _unit(self._pooled(batch, {}))

    def encode_images(self, batch: Batch) -> Tensor:
        """The same before they are made unit length ``[I, D]``: what the papers' linear probes read."""
        return self._pooled(batch, {}).x[:, 0].float()  # [I, D]

    def embed_texts(self, batch: Batch) -> Tensor:
        """The batch's texts as vectors of unit length ``[B, D]``, float32 or wider. Raises DataError."""
        return self._embed_texts(batch, {})

    def scale(self) -> Tensor:
        """What cosines are multiplied with, a scalar ``[]``; in evaluation at most ``max_scale``."""
        value = self.logit_scale.exp() if self.config.scale == "log" else 1 / self.temperature
        if self.training or self.config.max_scale is None:
            return value
        return value.clamp(max=self.config.max_scale)

    @property
    def bias(self) -> Tensor | None:
        """What is added to scaled cosines, a scalar ``[]``, or None."""
        return self.logit_bias

    def score(self, images: Tensor, texts: Tensor) -> Tensor:
        """``images [I, D]``, ``texts [B, D]`` of unit length → scores ``[I, B]``: ``scale · cosine + bias``."""
        scores = self.scale().to(images.dtype) * images @ texts.T  # [I, B]
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)

    def scale_bounds(self) -> dict[str, tuple[float, float]]:
        """The scale's parameter with its lowest and highest value: a scale of at least 1 and at most ``max_scale``."""
        if self.config.max_scale is None:
            return {}
        if self.config.scale == "log":
            return {"logit_scale": (0.0, math.log(self.config.max_scale))}
        return {"temperature": (1 / self.config.max_scale, 1.0)}

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """``batch [B, T]`` → ``Output``: hidden ``[B, D]``, and named: ``image/embeds [I, D]``, ``text/embeds [B, D]``,
        ``logits_per_image [I, B]``, ``logits_per_text [B, I]``. What is asked for in ``logits`` is not looked at.
        """
        named: dict[str, Any] = {}
        images = _unit(self._pooled(batch, named))  # [I, D]
        texts = self._embed_texts(batch, named)  # [B, D]
        scores = self.score(images, texts)  # [I, B]
        named |= {f"{self.config.kind}/embeds": images, "text/embeds": texts}
        named |= {"logits_per_image": scores, "logits_per_text": scores.T}
        return Output(texts, named=named)

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """Two towers write no text ``[B, V]``: raises ConfigError."""
        raise ConfigError(SILENT)

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Two towers write no text: raises ConfigError."""
        raise ConfigError(SILENT)

    def _pooled(self, batch: Batch, named: dict[str, Any]) -> Tokens:
        """The batch's media, one vector each: ``x [I, 1, D]``."""
        kind = self.config.kind
        if kind not in batch.media:
            raise DataError(f"sample {_first(batch)!r}: the batch holds no {kind}; give one to each sample")
        media = batch.media[kind]
        _check_units(kind, media, batch.ids)
        features = media.features[kind] if media.features else all_sizes(self.encoders[kind], media)  # [I, N, D_in]
        named[f"{kind}/features"] = features
        return self.connectors[kind](features)  # type: ignore[no-any-return]

    def _embed_texts(self, batch: Batch, named: dict[str, Any]) -> Tensor:
        mask = batch.segment_ids != 0  # [B, T]
        if mask.shape[1] == 0 or not bool(mask[:, 0].all()):
            row = 0 if mask.shape[1] == 0 else int((~mask[:, 0]).nonzero()[0])
            raise DataError(
                f"sample {batch.ids[row] if batch.ids else row!r}: has no text at position 0; give it one, and pad "
                "batches for two towers on the right"
            )
        tokens: Tokens = self.encoders[TEXT](batch.input_ids, mask)  # [B, T, D_in]
        named["text/features"] = tokens
        return _unit(self.connectors[TEXT](tokens))


def _unit(tokens: Tokens) -> Tensor:
    """``x [B, 1, D]`` → ``[B, D]`` of unit length, in float32 where it was narrower."""
    x = tokens.x[:, 0]
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _check_units(kind: str, media: MediaBatch, ids: list[str]) -> None:
    for layout, owner in zip(media.layouts, media.owners, strict=True):
        if layout.units != 1:
            raise DataError(
                f"sample {ids[owner]!r}: its {kind} was cut into {layout.units} units, two towers read 1; take the "
                "tiling out of the front end"
            )


def _first(batch: Batch) -> str:
    return batch.ids[0] if batch.ids else "0"
