"""Words and patches in one transformer, from the first block on: no tower, no region detector.

Paper: ViLT (arXiv:2102.03334). Reference: dandelin/ViLT 762fd39; ``ViltModel`` and its classes with heads in
transformers 5.23, equal to 1e-5 in float32.

The sequence is [text | class vector of the picture | patches]. What is pooled is the text's first position; the class
vector of the picture only stands there. Pictures keep their proportions: positions are carried to each picture's own
grid, bilinear with the corners in place.

Differences by design: patches that a batch only holds because another picture is larger are left out, where both
references fill up with masked ones drawn at random; patches keep their order, where both permute them; the number of
patches is bounded by ``sampled_patches`` in training only, so that an evaluation gives the same numbers twice;
attention and perceptrons have no dropout (ViLT: 0.1). As everywhere: padding cannot be seen.

Letters: ``B`` samples, ``T`` words, ``N`` patches and the class vector, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from chiasm.encoders.vit import Block
from chiasm.errors import ConfigError
from chiasm.fusion.heads import Heads, Pooler, WordHead, initialise, two_layers
from chiasm.fusion.pair import Joint, PairConfig, PairModel, Pictures, Words, lacks
from chiasm.nn.again import call
from chiasm.nn.patch import Patches
from chiasm.nn.words import WordEmbedding
from chiasm.registry import register
from chiasm.types import Batch


@register("fusion", "single_stream")
class SingleStream(PairModel):
    """One stack of blocks over words and patches."""

    class Config(PairConfig):
        """``kinds`` is the number of modality vectors: text, picture, and where ``images`` is 2 the second picture.

        ``text_eps`` is the epsilon of the norms that come from BERT, ``norm_eps`` of those that come from ViT.
        ``tied`` shares the matrix of the word head with the embedding, as the classes of transformers do (ViLT: no).
        """

        type: str = "single_stream"
        text_positions: PositiveInt = 40
        text_kinds: PositiveInt = 2
        kinds: PositiveInt = 2
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        image_size: PositiveInt = 384
        patch: PositiveInt = 32
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
        norm_eps: float = 1e-6
        text_eps: float = 1e-12
        sampled_patches: PositiveInt | None = None
        tasks: Heads = Heads()
        tied: bool = False

        @model_validator(mode="after")
        def _fits(self) -> SingleStream.Config:
            if self.dim % self.heads:
                raise ConfigError(f"single_stream: width {self.dim} cannot be split into {self.heads} heads")
            if self.kinds <= self.images:
                raise ConfigError(
                    f"single_stream: {self.images} pictures and the text need {self.images + 1} modality vectors, "
                    f"kinds is {self.kinds}"
                )
            if self.tied and not self.tasks.words:
                raise ConfigError("single_stream: tied=true without a word head; set tasks.words")
            return self

    config: Config

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.text = WordEmbedding(c.text_vocab, c.text_positions, c.text_kinds, c.dim, c.text_eps)
        self.patch = Patches(3, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.positions = nn.Parameter(torch.empty((c.image_size // c.patch) ** 2 + 1, c.dim))
        self.kinds = nn.Embedding(c.kinds, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp, c.activation, c.norm_eps) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.pooler = Pooler(c.dim)
        self.word_scores = WordHead(c.dim, c.text_vocab, c.text_eps) if c.tasks.words else None
        self.match_scores = nn.Linear(c.dim, 2) if c.tasks.match else None
        self.rank_score = nn.Linear(c.dim, 1) if c.tasks.rank else None
        wide = c.dim * max(2, c.images)
        self.classifier = two_layers(c.dim * c.images, wide, c.tasks.classes) if c.tasks.classes else None
        initialise(self)
        nn.init.trunc_normal_(self.cls, std=0.02, a=-0.04, b=0.04)
        if self.word_scores is not None and c.tied:
            self.word_scores.decoder.weight = self.text.words.weight

    @classmethod
    def compose(cls, config: Config) -> SingleStream:
        """The model of a configuration."""
        return cls(config)

    def joint(self, words: Words, pictures: Pictures, place: int = 0) -> Joint:
        """Words ``[B, T]`` and a picture each → states ``[B, T + N, D]``; ``place``: its number in the sample."""
        text = self.text(words.ids) + self.kinds.weight[0]  # [B, T, D]
        image, seen = self.patches(pictures)  # [B, N, D], [B, N]
        x = torch.cat((text, image + self.kinds.weight[place + 1]), dim=1)  # [B, T + N, D]
        mask = torch.cat((words.mask, seen), dim=1)  # [B, T + N]
        for block in self.blocks:
            x = call(block, self.recompute, x, mask)
        x = self.norm(x)
        texts = text.shape[1]
        return Joint(x, mask, slice(0, texts), slice(texts, None), self.pooler(x))

    def patches(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Pictures → class vector and patches with their positions ``[B, N, D]``, and which are there ``[B, N]``."""
        x, (rows, columns) = self.patch(pictures.pixels)  # [B, rows*columns, D]
        own = []
        for plane, (height, width) in zip(x.unflatten(1, (rows, columns)), pictures.sizes, strict=True):
            grid = height // self.config.patch, width // self.config.patch
            vectors = plane[: grid[0], : grid[1]].flatten(0, 1) + self.places(grid)  # [h*w, D]
            own.append(torch.cat(((self.cls + self.positions[0]).unsqueeze(0), self._sampled(vectors))))  # [1 + n, D]
        lengths = torch.tensor([len(vectors) for vectors in own], device=x.device)
        padded = pad_sequence(own, batch_first=True)  # [B, N, D]
        return padded, torch.arange(padded.shape[1], device=x.device) < lengths.unsqueeze(1)

    def places(self, grid: tuple[int, int]) -> Tensor:
        """The positions carried to a ``grid`` of (rows, columns): ``[rows·columns, D]``."""
        side = self.config.image_size // self.config.patch
        if grid == (side, side):
            return self.positions[1:]
        plane = self.positions[1:].T.reshape(1, -1, side, side)  # [1, D, side, side]
        return F.interpolate(plane, size=grid, mode="bilinear", align_corners=True)[0].flatten(1).T

    def _sampled(self, vectors: Tensor) -> Tensor:
        """In training at most ``sampled_patches`` of a picture's patches ``[n, D]``, drawn without regard to place."""
        most = self.config.sampled_patches
        if not self.training or most is None or len(vectors) <= most:
            return vectors
        return vectors[torch.randperm(len(vectors), device=vectors.device)[:most].sort().values]

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

    def rank(self, joint: Joint) -> Tensor:
        """One score each ``[B]``: ViLT's retrieval head."""
        if self.rank_score is None:
            raise ConfigError(lacks(self, "ranks", "tasks.rank"))
        return self.rank_score(joint.pooled)[:, 0]  # [B]

    def match(self, batch: Batch) -> Tensor:
        """How well words and picture match ``[B]``: the retrieval head where there is one, else the matching head."""
        words, pictures = self.read(batch)
        joint = self.joint(words, pictures[0])
        return self.rank(joint) if self.rank_score is not None else self.match_logits(joint)[:, 1]

    def word_head(self, states: Tensor) -> Tensor:
        """``[..., D]`` → ``[..., V]``."""
        if self.word_scores is None:
            raise ConfigError(lacks(self, "masked words", "tasks.words"))
        return self.word_scores(states)

    def after_start(self, fresh: set[str]) -> None:
        """Called when a trained model's tensors were read and those in ``fresh`` were not."""
        if "rank_score.weight" in fresh and self.match_scores is not None and "match_scores.weight" not in fresh:
            self.start_ranking()

    def start_ranking(self) -> None:
        """Give the retrieval head the matching head's weights for "matches", as ViLT does before fine-tuning."""
        if self.rank_score is None or self.match_scores is None:
            raise ConfigError("start_ranking needs both heads; set tasks.match and tasks.rank")
        with torch.no_grad():
            self.rank_score.weight.copy_(self.match_scores.weight[1:])
            self.rank_score.bias.copy_(self.match_scores.bias[1:])
