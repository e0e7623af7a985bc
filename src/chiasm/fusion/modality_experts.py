"""A transformer whose attention all share and whose perceptrons each serve one modality: picture, text, or both.

Paper: VLMo (arXiv:2111.02358). Reference: microsoft/unilm ``vlmo`` 768a3c8, read and not run; the formulas written out
in float64, ``tests/parity/test_vlmo.py``.

Three routes go through the same blocks. A picture alone uses the picture's perceptrons, a text alone the text's. Both
together use both, each on its own positions, up to the block ``both_from``; from there on one serves all. For
contrast the upper blocks are run a second time with that perceptron, over a picture or a text alone. Places are a bias
on the attention's scores, read from one table for all blocks; or, in the "base plus" size, learned vectors.

Differences by design: texts need not be padded to 40 words, because the bias of two words depends on their distance
only and padding is masked; no stochastic depth and no dropout (the reference feeds its drop-path rate to BERT's).

Letters: ``B`` samples, ``T`` words, ``N`` patches and the class vector, ``D`` width, ``H`` heads, ``S = T + N``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.heads import Heads, Pooler, WordHead, initialise, two_layers
from chiasm.fusion.pair import Joint, PairConfig, PairModel, Pictures, Words, lacks, pictures_of, words_of
from chiasm.nn.again import call
from chiasm.nn.depth import dropped
from chiasm.nn.mlp import MLP
from chiasm.nn.patch import Patches
from chiasm.nn.words import WordEmbedding
from chiasm.registry import register
from chiasm.types import Batch

Route = Literal["text", "image", "both"]


class Attention(nn.Module):
    """Shared by all modalities. Keys have no bias; ``bias [B or 1, H, S, S]`` is added to the scores."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x [B, S, D]``, ``bias [B, H or 1, S or 1, S]`` (-inf: may not be attended to) → ``[B, S, D]``."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # [B, H, S, D/H]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class Block(nn.Module):
    """``x += g1 · attention(norm(x))``, ``x += g2 · mlp(norm(x))`` with norm and perceptron of the modality."""

    drop_path = 0.0  # chance that training leaves a branch out (``chiasm.nn.depth``)

    def __init__(self, c: ModalityExperts.Config, both: bool):
        super().__init__()
        kinds = ("text", "image", "both") if both else ("text", "image")
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attn = Attention(c.dim, c.heads)
        self.norm2 = nn.ModuleDict({kind: nn.LayerNorm(c.dim, eps=c.norm_eps) for kind in kinds})
        self.mlp = nn.ModuleDict({kind: MLP(c.dim, c.mlp, "gelu") for kind in kinds})
        start = c.layer_scale
        self.gamma1 = None if start is None else nn.Parameter(torch.full((c.dim,), start))
        self.gamma2 = None if start is None else nn.Parameter(torch.full((c.dim,), start))

    def forward(self, x: Tensor, bias: Tensor, route: Route, texts: int) -> Tensor:
        """``x [B, S, D]``, of which the first ``texts`` are words → ``[B, S, D]``."""
        y = self.attn(self.norm1(x), bias)
        x = x + dropped(y if self.gamma1 is None else self.gamma1 * y, self.drop_path, self.training)
        if route == "both" and "both" not in self.mlp:
            y = torch.cat((self._expert(x[:, :texts], "text"), self._expert(x[:, texts:], "image")), dim=1)
        else:
            y = self._expert(x, route)
        return x + (y if self.gamma2 is None else self.gamma2 * y)

    def _expert(self, x: Tensor, kind: str) -> Tensor:
        return dropped(self.mlp[kind](self.norm2[kind](x)), self.drop_path, self.training)


@register("fusion", "modality_experts")
class ModalityExperts(PairModel):
    """Picture, words, or both through one stack of blocks."""

    class Config(PairConfig):
        """``both_from``: the block from which on one perceptron serves words and picture together.

        ``places``: ``"bias"`` on the attention's scores, with distances between words up to ``text_distance``, or
        ``"vectors"`` for pictures and ``text_positions`` words. ``layer_scale`` None: there is none. ``contrast``:
        projections and a scale for comparing; ``contrast_both``: a second set for the shared perceptron's route.
        """

        type: str = "modality_experts"
        kinds: PositiveInt = 2
        text_kinds: PositiveInt = 2
        text_positions: PositiveInt = 40
        text_distance: PositiveInt = 196
        image_size: PositiveInt = 224
        patch: PositiveInt = 16
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        both_from: PositiveInt = 10
        places: Literal["bias", "vectors"] = "bias"
        layer_scale: float | None = Field(default=0.1, gt=0)
        norm_eps: float = 1e-6
        text_eps: float = 1e-12
        contrast: bool = False
        contrast_both: bool = False
        tasks: Heads = Heads()

        @model_validator(mode="after")
        def _fits(self) -> ModalityExperts.Config:
            if self.dim % self.heads:
                raise ConfigError(f"modality_experts: width {self.dim} cannot be split into {self.heads} heads")
            if self.both_from > self.depth:
                raise ConfigError(f"modality_experts: both_from {self.both_from} lies behind the {self.depth} blocks")
            if self.kinds <= self.images:
                raise ConfigError(
                    f"modality_experts: {self.images} pictures and the text need {self.images + 1} modality vectors, "
                    f"kinds is {self.kinds}"
                )
            if self.contrast_both and not self.contrast:
                raise ConfigError("modality_experts: contrast_both needs contrast")
            if self.tasks.rank:
                raise ConfigError("modality_experts: it ranks by cosines or its matching head; leave tasks.rank out")
            return self

        @property
        def side(self) -> int:
            """Patches of a picture's side."""
            return self.image_size // self.patch

        @property
        def distances(self) -> tuple[int, int]:
            """Rows of the table of biases: of pictures, and all."""
            image = (2 * self.side - 1) ** 2 + 3
            return image, image + 2 * self.text_distance + 2

    config: Config

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        vectors = c.places == "vectors"
        self.text = WordEmbedding(c.text_vocab, c.text_positions if vectors else 0, c.text_kinds, c.dim, c.text_eps)
        self.patch = Patches(3, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.positions = nn.Parameter(torch.empty(1 + c.side**2, c.dim)) if vectors else None
        self.biases = None if vectors else nn.Parameter(torch.empty(c.distances[1], c.heads * c.depth))
        self.kinds = nn.Embedding(c.kinds, c.dim)
        self.blocks = nn.ModuleList(Block(c, both=i >= c.both_from) for i in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.pooler = Pooler(c.dim)
        self.word_scores = WordHead(c.dim, c.text_vocab, c.text_eps) if c.tasks.words else None
        self.match_scores = nn.Linear(c.dim, 2) if c.tasks.match else None
        names = (["image", "text"] if c.contrast else []) + (["image_both", "text_both"] if c.contrast_both else [])
        self.projections = nn.ModuleDict({name: nn.Linear(c.dim, c.dim, bias=False) for name in names})
        scale = math.log(1 / 0.07)
        self.logit_scale = nn.Parameter(torch.tensor(scale)) if c.contrast else None
        self.logit_scale_both = nn.Parameter(torch.tensor(scale)) if c.contrast_both else None
        classes, wide = c.tasks.classes, c.dim * max(2, c.images)
        self.classifier = two_layers(c.dim * c.images, wide, classes) if classes else None
        initialise(self)
        nn.init.trunc_normal_(self.cls, std=0.02, a=-0.04, b=0.04)

    @classmethod
    def compose(cls, config: Config) -> ModalityExperts:
        """The model of a configuration."""
        return cls(config)

    # ---------------------------------------------------------------------------------------------- three routes

    def joint(self, words: Words, pictures: Pictures, place: int = 0) -> Joint:
        """Words ``[B, T]`` and a picture each → states ``[B, S, D]``, words first; ``place``: its number."""
        text, image = self.text_input(words), self.image_input(pictures, place)  # [B, T, D], [B, N, D]
        texts = text.shape[1]
        seen = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        mask = torch.cat((words.mask, seen), dim=1)  # [B, S]
        x, biases = torch.cat((text, image), dim=1), self.scores(texts, image.shape[1], mask)
        for block, bias in zip(self.blocks, biases, strict=True):
            x = call(block, self.recompute, x, bias, "both", texts)
        x = self.norm(x)
        return Joint(x, mask, slice(0, texts), slice(texts, None), self.pooler(x))

    def image_states(self, pictures: Pictures, both: bool = False) -> tuple[Tensor, Tensor | None]:
        """Pictures alone → ``[B, N, D]``, and with ``both`` what the shared perceptron makes of them."""
        x = self.image_input(pictures, 0)  # [B, N, D]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self._alone(x, self.scores(0, x.shape[1], mask), "image", both)

    def text_states(self, words: Words, both: bool = False) -> tuple[Tensor, Tensor | None]:
        """Words alone → ``[B, T, D]``, and with ``both`` what the shared perceptron makes of them."""
        x = self.text_input(words)  # [B, T, D]
        return self._alone(x, self.scores(x.shape[1], 0, words.mask), "text", both)

    def _alone(self, x: Tensor, biases: Sequence[Tensor], route: Route, both: bool) -> tuple[Tensor, Tensor | None]:
        shared = x
        for number, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            if number == self.config.both_from:
                shared = x
            if number >= self.config.both_from and both:
                shared = call(block, self.recompute, shared, bias, "both", 0)
            x = call(block, self.recompute, x, bias, route, 0)
        return self.norm(x), self.norm(shared if self.config.both_from < self.config.depth else x) if both else None

    def text_input(self, words: Words) -> Tensor:
        """``[B, T, D]``. Raises DataError where the table of distances is too short."""
        count, room = words.ids.shape[1], self.config.text_distance - 1
        if self.biases is not None and count > room:
            raise DataError(
                f"a text of {count} tokens goes beyond the distances of {room} words that the model knows; shorten it, "
                "or set the template's length"
            )
        return self.text(words.ids) + self.kinds.weight[0]

    def image_input(self, pictures: Pictures, place: int) -> Tensor:
        """Class vector and patches ``[B, N, D]``. Raises DataError for another size than the model's."""
        x, grid = self.patch(pictures.pixels)  # [B, N - 1, D]
        if grid != (self.config.side, self.config.side):
            size = tuple(pictures.pixels.shape[-2:])
            raise DataError(
                f"pictures of {size[0]}x{size[1]} pixels, the model's places are for {self.config.image_size} squared; "
                "set the front end's size, or carry the table to another size with chiasm.convert.maps_vlmo.carried"
            )
        x = torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1)  # [B, N, D]
        x = x if self.positions is None else x + self.positions
        return x + self.kinds.weight[place + 1]

    def scores(self, texts: int, images: int, mask: Tensor) -> list[Tensor]:
        """What is added to the scores of each block's attention: ``[B, H or 1, S or 1, S]``, -inf where nothing is."""
        absent = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None, None, :]
        if self.biases is None:
            return [absent] * self.config.depth
        index = places(self.config.side, self.config.text_distance, texts, images).to(mask.device)  # [S, S]
        found = self.biases[index].permute(2, 0, 1)  # [H*depth, S, S]
        return [part.unsqueeze(0) + absent for part in found.chunk(self.config.depth)]

    # ---------------------------------------------------------------------------------------------- heads

    def class_logits(self, words: Words, pictures: Sequence[Pictures]) -> Tensor:
        """``[B, C]``: the text is read with each picture by itself, what is pooled stands side by side."""
        if self.classifier is None:
            raise ConfigError(lacks(self, "classes", "tasks.classes"))
        pooled = [self.joint(words, picture, place).pooled for place, picture in enumerate(pictures)]  # each [B, D]
        return self.classifier(torch.cat(pooled, dim=1))  # type: ignore[arg-type]

    def match_logits(self, joint: Joint) -> Tensor:
        """``[B, 2]``: does not match, matches."""
        if self.match_scores is None:
            raise ConfigError(lacks(self, "matches", "tasks.match"))
        return self.match_scores(joint.pooled)

    def word_head(self, states: Tensor) -> Tensor:
        """``[..., D]`` → ``[..., V]``."""
        if self.word_scores is None:
            raise ConfigError(lacks(self, "masked words", "tasks.words"))
        return self.word_scores(states)

    def match(self, batch: Batch) -> Tensor:
        """How well words and picture match ``[B]``: the matching head, or the cosine where there is none."""
        if self.match_scores is not None:
            return super().match(batch)
        return (self.embed_images(batch) * self.embed_texts(batch)).sum(1)

    def vectors(self, states: Tensor, name: str) -> Tensor:
        """States ``[B, N, D]`` → vectors of unit length ``[B, D]`` by the projection called ``name``."""
        if name not in self.projections:
            raise ConfigError(lacks(self, "cosines", "contrast_both" if name.endswith("both") else "contrast"))
        x = self.projections[name](states[:, 0])
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

    def embed_images(self, batch: Batch) -> Tensor:
        """The batch's pictures as vectors of unit length ``[B, D]``."""
        return self.vectors(self.image_states(pictures_of(batch, 1)[0])[0], "image")

    def embed_texts(self, batch: Batch) -> Tensor:
        """The batch's texts as vectors of unit length ``[B, D]``."""
        return self.vectors(self.text_states(words_of(batch))[0], "text")

    def scale(self) -> Tensor:
        """What cosines are multiplied with ``[]``; not bounded, as in the reference."""
        if self.logit_scale is None:
            raise ConfigError(lacks(self, "cosines", "contrast"))
        return self.logit_scale.exp()


def places(side: int, distance: int, texts: int, images: int) -> Tensor:
    """Which row of the table each pair of positions reads ``[S, S]``: ``texts`` words, then ``images`` (0: none).

    Pictures: a row for each difference of grid places, then class vector → patch, patch → class vector, itself. Then
    word → picture, picture → word. Then words by distance, and the first word as the class vector.
    """
    wide = 2 * side - 1
    image_rows = wide * wide + 3
    total = image_rows + 2 * distance + 2
    index = torch.zeros(texts + images, texts + images, dtype=torch.long)
    if texts:
        words = torch.arange(texts - 1)
        own = index[:texts, :texts]
        own[1:, 1:] = words[None, :] - words[:, None] + (distance - 2) + image_rows + 2
        own[0, :], own[:, 0] = total - 3, total - 2
        own[0, 0] = total - 1
    if images:
        rows, columns = (torch.arange(side * side) // side, torch.arange(side * side) % side)
        own = index[texts:, texts:]
        own[1:, 1:] = (rows[:, None] - rows + side - 1) * wide + columns[:, None] - columns + side - 1
        own[0, :], own[:, 0] = image_rows - 3, image_rows - 2
        own[0, 0] = image_rows - 1
        index[:texts, texts:] = image_rows
        index[texts:, :texts] = image_rows + 1
    return index
