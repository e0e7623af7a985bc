"""Align before fuse: a picture's tower, a text's tower, and layers in which the text looks at the picture.

Paper: ALBEF (arXiv:2107.07651). Reference: salesforce/ALBEF b9727e4, read and not run; the formulas written out in
float64, ``tests/parity/test_albef.py``.

A ViT reads the picture, the lower half of a BERT the words; vectors of both are compared (contrast). The upper half of
the BERT fuses: self-attention, attention to the picture, perceptron. With two pictures (NLVR2) every fusion layer
stands twice, and looks at the first and at the second in turn; keys and values of the two are made by one matrix.
Questions are answered by a decoder that writes the answer's words and ranks a list of answers.

A momentum copy of everything that is compared or predicts words, the follower, goes after the model slowly and gives
soft targets; queues keep its vectors of earlier samples. Follower and queues are buffers: saved and never trained.

Differences by design: no dropout (BERT: 0.1); a queue takes steps of any size (the reference needs divisors of it);
pictures need not be of the size of the position table.

Letters: ``B`` samples, ``T`` words, ``N`` patches and the class vector, ``D`` width, ``E`` width that is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from chiasm import registry
from chiasm.config import Config as Values
from chiasm.config import part
from chiasm.encoders.bert import BertBlock
from chiasm.errors import ConfigError
from chiasm.fusion.heads import Heads
from chiasm.fusion.pair import Joint, PairConfig, PairModel, Pictures, Words, lacks, pictures_of, words_of
from chiasm.nn.again import call
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.follower import as_buffers, follow
from chiasm.nn.words import WordEmbedding
from chiasm.registry import register
from chiasm.types import Batch


class Momentum(Values):
    """``rate``: the share of a copy that stays at each step. ``queue``: vectors of earlier samples that are kept, with
    ``pictures`` each beside a key of its picture, so that all texts of one picture are right (retrieval).
    """

    rate: float = Field(default=0.995, ge=0, lt=1)
    queue: PositiveInt = 65536
    pictures: bool = False


class FusionBlock(BertBlock):
    """A block of BERT that looks at a source between its attention and its perceptron."""

    def __init__(self, dim: int, heads: int, mlp: int, activation: str, eps: float, source_dim: int):
        super().__init__(dim, heads, mlp, activation, eps)
        self.cross = CrossAttention(dim, heads, source_dim)
        self.cross_norm = nn.LayerNorm(dim, eps=eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None, source: Tensor, seen: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """``x [B, T, D]`` with ``mask [B, T]``, ``source [B, L, D_source]`` with ``seen [B, L]`` → ``[B, T, D]``.

        ``causal``: words see those before them, and no mask is needed where padding stands on the right.
        """
        x = self.norm1(x + self.attn(x, None if causal else mask, causal))
        x = self.cross_norm(x + self.cross(x, source, None if seen is None else seen[:, None, None, :]))
        return self.norm2(x + self.mlp(x))


class WordScores(nn.Module):
    """BERT's head over the vocabulary; its matrix is the table of words."""

    def __init__(self, dim: int, vocab: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """``x [..., D]``, ``table [V, D]`` → ``[..., V]``."""
        return F.linear(self.norm(F.gelu(self.dense(x))), table, self.bias)  # [..., V]


class Body(nn.Module):
    """Both towers, the fusion layers, and what is compared or predicts words: all that has a momentum copy."""

    recompute = False

    def __init__(self, c: ALBEF.Config):
        super().__init__()
        self.images = c.images
        self.vision = registry.get("encoder", c.vision.type)(c.vision)
        self.words = WordEmbedding(c.text_vocab, c.text_positions, c.text_kinds, c.dim, c.text_eps)
        sizes = (c.dim, c.heads, c.mlp, c.activation, c.text_eps)
        self.text = nn.ModuleList(BertBlock(*sizes) for _ in range(c.text_depth))
        wide = self.vision.dim
        self.fusion = nn.ModuleList(FusionBlock(*sizes, wide) for _ in range(c.fusion_depth * c.images))
        blocks: list[Any] = list(self.fusion)
        for first, second in zip(blocks[0::2], blocks[1::2], strict=True) if c.images == 2 else ():
            first.cross.k, first.cross.v = second.cross.k, second.cross.v
        self.image_proj = nn.Linear(wide, c.contrast) if c.contrast else None
        self.text_proj = nn.Linear(c.dim, c.contrast) if c.contrast else None
        self.word_scores = WordScores(c.dim, c.text_vocab, c.text_eps) if c.tasks.words else None

    def image_states(self, pictures: Pictures) -> Tensor:
        """``[B, N, D_vision]``, the class vector first."""
        return self.vision(pictures.pixels).x

    def text_states(self, words: Words) -> Tensor:
        """Words before they have seen a picture ``[B, T, D]``."""
        x = self.words(words.ids)  # [B, T, D]
        for block in self.text:
            x = call(block, self.recompute, x, words.mask)
        return x

    def fuse(self, text: Tensor, mask: Tensor, images: Sequence[Tensor]) -> Tensor:
        """``text [B, T, D]``, ``mask [B, T]``, ``[B, N, D_vision]`` of each picture → ``[B, T, D]``."""
        for number, block in enumerate(self.fusion):
            text = call(block, self.recompute, text, mask, images[number % len(images)])
        return text

    def image_vectors(self, states: Tensor) -> Tensor:
        """States ``[B, N, D_vision]`` → ``[B, E]`` of unit length."""
        if self.image_proj is None:
            raise ConfigError("this albef model compares no vectors; set model.contrast to their width")
        return _unit(self.image_proj(states[:, 0]))

    def text_vectors(self, states: Tensor) -> Tensor:
        """States ``[B, T, D]`` → ``[B, E]`` of unit length."""
        if self.text_proj is None:
            raise ConfigError("this albef model compares no vectors; set model.contrast to their width")
        return _unit(self.text_proj(states[:, 0]))


class Decoder(nn.Module):
    """Writes an answer word by word, looking at the states of the question."""

    def __init__(self, c: ALBEF.Config):
        super().__init__()
        self.words = WordEmbedding(c.text_vocab, c.text_positions, c.text_kinds, c.dim, c.text_eps)
        sizes = (c.dim, c.heads, c.mlp, c.activation, c.text_eps)
        self.blocks = nn.ModuleList(FusionBlock(*sizes, c.dim) for _ in range(c.answer_depth))
        self.word_scores = WordScores(c.dim, c.text_vocab, c.text_eps)

    def forward(self, ids: Tensor, question: Tensor, seen: Tensor) -> Tensor:
        """``ids [B, S]``, ``question [B, T, D]`` with ``seen [B, T]`` → logits of the next word ``[B, S, V]``."""
        x = self.words(ids)  # [B, S, D]
        for block in self.blocks:
            x = block(x, None, question, seen, causal=True)
        return self.word_scores(x, self.words.words.weight)  # [B, S, V]


@register("fusion", "albef")
class ALBEF(PairModel):
    """Towers, fusion layers, heads, and their momentum copies."""

    class Config(PairConfig):
        """``contrast``: width of the vectors that are compared (None: there are none). ``answer_depth``: layers of the
        decoder that answers questions (0: there is none). ``temperature`` divides cosines. ``assign``: a head that says
        which of two pictures a text belongs to.
        """

        type: str = "albef"
        vision: part("encoder")  # type: ignore[valid-type]
        text_positions: PositiveInt = 512
        text_kinds: PositiveInt = 2
        dim: PositiveInt = 768
        text_depth: PositiveInt = 6
        fusion_depth: PositiveInt = 6
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        activation: Literal["gelu", "gelu_tanh"] = "gelu"
        text_eps: float = 1e-12
        contrast: PositiveInt | None = 256
        temperature: PositiveFloat = 0.07
        momentum: Momentum | None = None
        answer_depth: int = Field(default=0, ge=0)
        assign: bool = False
        tasks: Heads = Heads()

        @model_validator(mode="after")
        def _fits(self) -> ALBEF.Config:
            if self.dim % self.heads:
                raise ConfigError(f"albef: width {self.dim} cannot be split into {self.heads} heads")
            if self.images > 2:
                raise ConfigError(f"albef: fusion layers for {self.images} pictures; give 1 or 2")
            if self.momentum and not self.contrast and not self.answer_depth:
                raise ConfigError("albef: queues hold the vectors that are compared; set contrast, or momentum to null")
            if self.assign and not (self.images == 2 and self.contrast):
                raise ConfigError("albef: a text is assigned to one of two pictures; set images: 2 and contrast")
            if self.tasks.rank:
                raise ConfigError("albef: it ranks with its matching head; set tasks.match instead of tasks.rank")
            if getattr(self.vision, "select", "cls_patch") != "cls_patch":
                raise ConfigError(f"albef: vision.select is {self.vision.select!r}; it needs 'cls_patch'")
            return self

    config: Config
    image_queue: Tensor  # [Q, E]
    text_queue: Tensor
    queue_keys: Tensor  # [Q] long, with momentum.pictures
    queue_place: Tensor  # [1], where the next vectors go
    followed: Tensor  # [1], how many steps the follower has made in this stage; not saved with the model

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.body = Body(c)
        self.match_scores = nn.Linear(c.dim, 2) if c.tasks.match else None
        classes = c.tasks.classes
        self.classifier = (
            nn.Sequential(nn.Linear(c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, classes)) if classes else None
        )
        self.assign_scores = nn.Linear(c.dim, 3) if c.assign else None
        self.decoder = Decoder(c) if c.answer_depth else None
        self.temperature = nn.Parameter(torch.tensor(float(c.temperature))) if c.contrast else None
        for name, parameter in self.named_parameters():
            if not name.startswith("body.vision."):  # the tower has started by itself
                _start(name, parameter)
        self.follower = as_buffers(copy.deepcopy(self.body)) if c.momentum else None
        self.decoder_follower = as_buffers(copy.deepcopy(self.decoder)) if c.momentum and self.decoder else None
        if c.momentum:
            self.register_buffer("followed", torch.zeros(1), persistent=False)
        if c.momentum and c.contrast:
            for kind in ("image", "text"):
                queue = F.normalize(torch.randn(c.momentum.queue, c.contrast), dim=-1)  # [Q, E]
                self.register_buffer(f"{kind}_queue", queue)
            self.register_buffer("queue_place", torch.zeros(1, dtype=torch.long))
            if c.momentum.pictures:
                self.register_buffer("queue_keys", torch.zeros(c.momentum.queue, dtype=torch.long))  # [Q], 0: nothing

    @classmethod
    def compose(cls, config: Config) -> ALBEF:
        """The model of a configuration."""
        return cls(config)

    def joint(self, words: Words, pictures: Pictures, place: int = 0) -> Joint:
        """Words ``[B, T]`` that have seen a picture each: hidden ``[B, T, D]``; the picture's own states by name."""
        image = self.body.image_states(pictures)  # [B, N, D_vision]
        hidden = self.body.fuse(self.body.text_states(words), words.mask, [image] * self.config.images)  # [B, T, D]
        texts = words.ids.shape[1]
        named = {"image/features": image}
        return Joint(hidden, words.mask, slice(0, texts), slice(texts, texts), hidden[:, 0], named)

    def fused(self, words: Words, pictures: Sequence[Pictures]) -> Tensor:
        """Words that have seen all pictures of their sample ``[B, T, D]``."""
        images = [self.body.image_states(p) for p in pictures]
        return self.body.fuse(self.body.text_states(words), words.mask, images)

    # ---------------------------------------------------------------------------------------------- heads

    def class_logits(self, words: Words, pictures: Sequence[Pictures]) -> Tensor:
        """``[B, C]`` from the first word's state."""
        if self.classifier is None:
            raise ConfigError(lacks(self, "classes", "tasks.classes"))
        return self.classifier(self.fused(words, pictures)[:, 0])

    def match_logits(self, joint: Joint) -> Tensor:
        """``[B, 2]``: does not match, matches."""
        if self.match_scores is None:
            raise ConfigError(lacks(self, "matches", "tasks.match"))
        return self.match_scores(joint.pooled)

    def see(self, batch: Batch) -> Tensor:
        """The states of the batch's pictures ``[B, N, D_vision]``, for ``judge``."""
        return self.body.image_states(pictures_of(batch, 1)[0])

    def judge(self, seen: Tensor, batch: Batch) -> Tensor:
        """What ``match`` gives ``[B]``, of the states of pictures ``[B, N, D_vision]`` and the batch's texts."""
        words = words_of(batch)
        hidden = self.body.fuse(self.body.text_states(words), words.mask, [seen] * self.config.images)  # [B, T, D]
        return self.match_logits(Joint(hidden, words.mask, slice(0), slice(0), hidden[:, 0]))[:, 1]

    def word_head(self, states: Tensor, body: Body | None = None) -> Tensor:
        """``[..., D]`` → ``[..., V]``; ``body``: whose head (None: the model's own)."""
        body = body or self.body
        if body.word_scores is None:
            raise ConfigError(lacks(self, "masked words", "tasks.words"))
        return body.word_scores(states, body.words.words.weight)

    def answer_logits(self, words: Words, pictures: Sequence[Pictures], answers: Words) -> Tensor:
        """An answer to each question ``[B, S]`` → logits of its next words ``[B, S, V]``."""
        return self._decoder()(answers.ids, self.fused(words, pictures), words.mask)

    @torch.no_grad()
    def rank_answers(
        self, words: Words, pictures: Sequence[Pictures], answers: Words, most: int = 128
    ) -> tuple[Tensor, Tensor]:
        """The best of a list of ``answers [A, S]`` for each question: which ``[B, k]`` and their shares ``[B, k]``.

        The ``most`` with the likeliest first word are read whole; shares are over those, by the answer's likelihood.
        """
        decoder, question = self._decoder(), self.fused(words, pictures)  # [B, T, D]
        count, most = len(question), min(most, len(answers.ids))
        start = answers.ids[:1, :1].expand(count, 1)  # [B, 1]
        first = decoder(start, question, words.mask)[:, 0].log_softmax(-1)[:, answers.ids[:, 1]]  # [B, A]
        log_first, chosen = first.topk(most, dim=1)  # [B, k]
        ids, mask = answers.ids[chosen].flatten(0, 1), answers.mask[chosen].flatten(0, 1)  # [B*k, S]
        again = question.repeat_interleave(most, 0), words.mask.repeat_interleave(most, 0)
        logits = decoder(ids, *again)[:, :-1].log_softmax(-1)  # [B*k, S-1, V]
        taken = logits.gather(2, ids[:, 1:, None])[..., 0].masked_fill(~mask[:, 1:], 0)  # [B*k, S-1]
        # As in the reference, the first word counts twice: in the choice, and in the whole.
        shares = (log_first + taken.sum(1).view(count, most)).softmax(-1)
        best = shares.argsort(dim=1, descending=True)
        return chosen.gather(1, best), shares.gather(1, best)

    def _decoder(self) -> Decoder:
        if self.decoder is None:
            raise ConfigError(lacks(self, "answers", "answer_depth"))
        return self.decoder

    # ---------------------------------------------------------------------------------------------- comparing

    def embed_images(self, batch: Batch) -> Tensor:
        """The batch's pictures as vectors of unit length ``[B, E]``."""
        return self.body.image_vectors(self.body.image_states(pictures_of(batch, 1)[0]))

    def embed_texts(self, batch: Batch) -> Tensor:
        """The batch's texts as vectors of unit length ``[B, E]``."""
        return self.body.text_vectors(self.body.text_states(words_of(batch)))

    def scale(self) -> Tensor:
        """What cosines are multiplied with ``[]``."""
        if self.temperature is None:
            raise ConfigError(lacks(self, "cosines", "contrast"))
        return 1 / self.temperature

    # ---------------------------------------------------------------------------------------------- momentum

    @torch.no_grad()
    def follow(self) -> None:
        """The copies take a step towards the model."""
        self.followed += 1
        assert self.follower is not None and self.config.momentum is not None
        follow(self.body, self.follower, self.config.momentum.rate)
        if self.decoder is not None and self.decoder_follower is not None:
            follow(self.decoder, self.decoder_follower, self.config.momentum.rate)

    @torch.no_grad()
    def enqueue(self, images: Tensor, texts: Tensor, keys: Tensor | None = None) -> None:
        """Put vectors ``[n, E]`` each into the queues, over the oldest ones, and ``keys [n]`` of their pictures."""
        queues = [self.image_queue, self.text_queue]
        size, place = len(queues[0]), int(self.queue_place)
        rows = (place + torch.arange(len(images), device=images.device)) % size
        for queue, vectors in zip(queues, (images, texts), strict=True):
            queue[rows] = vectors.to(queue.dtype)
        if keys is not None:
            self.queue_keys[rows] = keys
        self.queue_place[0] = (place + len(images)) % size

    def moving(self) -> list[str]:
        """Names of the buffers that training changes though nothing learns them."""
        return [name for name, _ in self.named_buffers()]


def _start(name: str, parameter: Tensor) -> None:
    """BERT's fresh weights: normal of deviation 0.02 for matrices, biases 0."""
    if parameter.ndim > 1:
        nn.init.normal_(parameter, std=0.02)
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
