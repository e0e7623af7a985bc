"""A multiway transformer: one attention over picture and words, every weight in it twice, once for each of the two.

Paper: BEiT-3 (arXiv:2208.10442); its layer is Magneto's (arXiv:2210.06423), with a norm inside attention and
perceptron. Reference: microsoft/unilm ``beit3`` and torchscale 0.3.0, read and not run; the formulas written out in
float64, ``tests/parity/test_beit3.py``.

The sequence is [class vector of the picture | patches | text]. Three ways go through the same layers: picture, text,
both. With the third, words may also be read causally, for captions: a word sees the picture and the words before it,
the picture sees itself.

Differences by design: where the sequence is split is an argument, not a state of the modules, so that the model can be
compiled and used by several threads; the released code has two experts and so has this one (the paper's third, for
both, in the last three layers, is not in it); another picture size is interpolated as its position table is when it is
loaded by the reference; fresh positions have a deviation of 0.02 (torchscale leaves them at 1); no stochastic depth.

Letters: ``B`` samples, ``T`` words, ``N`` patches and the class vector, ``D`` width, ``S = N + T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from chiasm.errors import ConfigError, DataError
from chiasm.fusion.heads import Heads, Pooler, initialise, two_layers
from chiasm.fusion.pair import Joint, PairConfig, PairModel, Pictures, Words, lacks, pictures_of, words_of
from chiasm.nn.again import call
from chiasm.nn.depth import dropped
from chiasm.nn.patch import Patches
from chiasm.nn.positions import interpolate
from chiasm.registry import register
from chiasm.types import Batch

FIRST = 2  # positions are counted from here, as in fairseq: the first two rows of the tables are never used


class Experts(nn.Module):
    """Two modules of one form: ``image`` for the first ``split`` positions, ``text`` for the rest."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.image = make()
        self.text = make()

    def forward(self, x: Tensor, split: int) -> Tensor:
        """``x [B, S, D]`` → ``[B, S, D']``."""
        if split == 0:
            return self.text(x)
        if split == x.shape[1]:
            return self.image(x)
        return torch.cat((self.image(x[:, :split]), self.text(x[:, split:])), dim=1)  # [B, S, D']


class NormedMLP(nn.Module):
    """``fc2(norm(gelu(fc1(x))))``."""

    def __init__(self, dim: int, hidden: int, eps: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, N, D]`` → ``[B, N, D]``."""
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Layer(nn.Module):
    """``x += out(norm(attention(norm(x))))``, then ``x += mlp(norm(x))``, all but the attention itself by experts."""

    drop_path = 0.0  # chance that training leaves a branch out (``chiasm.nn.depth``)

    def __init__(self, dim: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.heads = heads
        self.attn_norm = Experts(lambda: nn.LayerNorm(dim, eps=eps))
        self.q = Experts(lambda: nn.Linear(dim, dim))
        self.k = Experts(lambda: nn.Linear(dim, dim))
        self.v = Experts(lambda: nn.Linear(dim, dim))
        self.inner_norm = Experts(lambda: nn.LayerNorm(dim, eps=eps))
        self.out = Experts(lambda: nn.Linear(dim, dim))
        self.mlp_norm = Experts(lambda: nn.LayerNorm(dim, eps=eps))
        self.mlp = Experts(lambda: NormedMLP(dim, mlp, eps))

    def forward(self, x: Tensor, split: int, mask: Tensor | None) -> Tensor:
        """``x [B, S, D]``, ``mask [B, 1, S or 1, S]`` (True: may be attended to) → ``[B, S, D]``."""
        y = self.attn_norm(x, split)
        q, k, v = (
            part(y, split).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )  # each [B, H, S, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # [B, S, D]
        rate, training = self.drop_path, self.training
        x = x + dropped(self.out(self.inner_norm(mixed, split), split), rate, training)
        return x + dropped(self.mlp(self.mlp_norm(x, split), split), rate, training)

    def without_effect(self) -> list[str]:
        """A bias of the keys adds one number to all scores of a query where a sequence holds one modality only."""
        return [f"k.{name}" for name, _ in self.k.named_parameters() if name.endswith("bias")]


@register("fusion", "multiway")
class Multiway(PairModel):
    """Picture, words, or both through one stack of multiway layers."""

    class Config(PairConfig):
        """``text_positions`` counts the rows of the table, of which the first two are unused.

        ``last_norm``: the norm after the last layer (BEiT-3's question answering and picture classification have none).
        ``contrast``: projections of picture and text, and the scale of their cosines. ``codes``: a head over the words
        of a visual tokenizer, for masked data modelling. ``picture_classes``: a head over pictures alone.
        """

        type: str = "multiway"
        text_vocab: PositiveInt = 64010
        text_positions: PositiveInt = 1024
        image_size: PositiveInt = 224
        patch: PositiveInt = 16
        dim: PositiveInt = 768
        depth: PositiveInt = 12
        heads: PositiveInt = 12
        mlp: PositiveInt = 3072
        norm_eps: float = 1e-5
        last_norm: bool = True
        contrast: bool = False
        codes: PositiveInt | None = None
        picture_classes: PositiveInt | None = None
        tasks: Heads = Heads()

        @model_validator(mode="after")
        def _fits(self) -> Multiway.Config:
            if self.dim % self.heads:
                raise ConfigError(f"multiway: width {self.dim} cannot be split into {self.heads} heads")
            if self.text_positions <= FIRST:
                raise ConfigError(f"multiway: of {self.text_positions} text_positions the first {FIRST} are unused")
            if self.images > 2:
                raise ConfigError(f"multiway: a classifier over {self.images} pictures; give 1 or 2")
            if self.tasks.match or self.tasks.rank:
                raise ConfigError("multiway: BEiT-3 matches by cosines; set contrast=true instead of a matching head")
            return self

    config: Config

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        side = c.image_size // c.patch
        self.words = nn.Embedding(c.text_vocab, c.dim)
        self.patch = Patches(3, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.covered = nn.Parameter(torch.empty(c.dim))  # stands for a patch that is hidden
        self.image_positions = nn.Parameter(torch.empty(FIRST + 1 + side * side, c.dim))
        self.text_positions = nn.Parameter(torch.empty(c.text_positions, c.dim))
        self.layers = nn.ModuleList(Layer(c.dim, c.heads, c.mlp, c.norm_eps) for _ in range(c.depth))
        self.norm = Experts(lambda: nn.LayerNorm(c.dim, eps=c.norm_eps)) if c.last_norm else None
        self.word_scores = nn.Linear(c.dim, c.text_vocab) if c.tasks.words else None
        self.code_scores = nn.Linear(c.dim, c.codes) if c.codes else None
        self.image_head = nn.Linear(c.dim, c.dim, bias=False) if c.contrast else None
        self.text_head = nn.Linear(c.dim, c.dim, bias=False) if c.contrast else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if c.contrast else None
        asks = c.tasks.classes is not None and c.images == 1
        self.pooler = Pooler(c.dim, norm=True) if asks else None
        self.classifier = self._classifier()
        self.picture_norm = nn.LayerNorm(c.dim) if c.picture_classes else None
        self.picture_classifier = nn.Linear(c.dim, c.picture_classes) if c.picture_classes else None
        self.reset_parameters()

    def _classifier(self) -> nn.Sequential | None:
        c = self.config
        if c.tasks.classes is None:
            return None
        if c.images == 1:
            return two_layers(c.dim, 2 * c.dim, c.tasks.classes)
        return two_layers(4 * c.dim, 2 * c.dim, c.tasks.classes, first_norm=True)

    def reset_parameters(self) -> None:
        """Fresh weights; heads that the reference starts near zero are scaled by a thousandth."""
        initialise(self)
        for vector in (self.cls, self.covered):
            nn.init.trunc_normal_(vector, std=0.02, a=-0.04, b=0.04)
        small = (
            [self.picture_classifier, *(self.classifier or [])]
            if self.config.images == 2
            else [self.picture_classifier]
        )
        for layer in small:
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(0.001)

    @classmethod
    def compose(cls, config: Config) -> Multiway:
        """The model of a configuration."""
        return cls(config)

    # ---------------------------------------------------------------------------------------------- three ways

    def joint(
        self,
        words: Words,
        pictures: Pictures,
        place: int = 0,
        causal: bool = False,
        covered: Tensor | None = None,
    ) -> Joint:
        """Words ``[B, T]`` and a picture each → states ``[B, S, D]``; ``covered [B, N - 1]``: patches that are hidden.

        ``causal``: words see the picture and the words up to themselves, and the picture does not see them.
        """
        image, text = self.image_input(pictures, covered), self.text_input(words)  # [B, N, D], [B, T, D]
        split = image.shape[1]
        seen = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        mask = torch.cat((seen, words.mask), dim=1)  # [B, S]
        x = self._run(torch.cat((image, text), dim=1), split, _allowed(mask, split, causal))  # [B, S, D]
        return Joint(x, mask, slice(split, None), slice(0, split), x[:, 0])

    def image_states(self, pictures: Pictures, covered: Tensor | None = None) -> Tensor:
        """Pictures alone → ``[B, N, D]``."""
        x = self.image_input(pictures, covered)  # [B, N, D]
        return self._run(x, x.shape[1], None)

    def text_states(self, words: Words) -> Tensor:
        """Words alone → ``[B, T, D]``."""
        return self._run(self.text_input(words), 0, words.mask[:, None, None, :])

    def image_input(self, pictures: Pictures, covered: Tensor | None = None) -> Tensor:
        """Class vector and patches with their positions ``[B, N, D]``."""
        x, grid = self.patch(pictures.pixels)  # [B, N - 1, D]
        if covered is not None:
            x = torch.where(covered.unsqueeze(-1), self.covered.to(x.dtype), x)
        side = self.config.image_size // self.config.patch
        x = torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1)  # [B, N, D]
        return x + interpolate(self.image_positions[FIRST:], (side, side), grid, prefix=1)

    def text_input(self, words: Words) -> Tensor:
        """Words with their positions ``[B, T, D]``. Raises DataError where there are too many."""
        count, room = words.ids.shape[1], self.config.text_positions - FIRST
        if count > room:
            raise DataError(
                f"a text of {count} tokens does not fit the {room} positions of the model; shorten it, or set the "
                "template's length"
            )
        return self.words(words.ids) + self.text_positions[FIRST : FIRST + count]

    def _run(self, x: Tensor, split: int, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = call(layer, self.recompute, x, split, mask)
        return x if self.norm is None else self.norm(x, split)

    # ---------------------------------------------------------------------------------------------- heads

    def class_logits(self, words: Words, pictures: Sequence[Pictures]) -> Tensor:
        """``[B, C]``: of one picture its class vector is read, of two theirs and the texts' first vectors."""
        if self.classifier is None:
            raise ConfigError(lacks(self, "classes", "tasks.classes"))
        if self.pooler is not None:
            return self.classifier(self.pooler(self.joint(words, pictures[0]).hidden))
        found = []
        for place, picture in enumerate(pictures):
            joint = self.joint(words, picture, place)
            found += [joint.hidden[:, 0], joint.hidden[:, joint.words.start]]  # [B, D] each
        return self.classifier(torch.cat(found, dim=1))

    def classify(self, batch: Batch) -> Tensor:
        """Scores of the classes ``[B, C]``; with a head over pictures alone no text is read."""
        if self.picture_classifier is not None:
            return self.picture_logits(pictures_of(batch, 1)[0])
        return super().classify(batch)

    def picture_logits(self, pictures: Pictures) -> Tensor:
        """Scores of a picture's own classes ``[B, C]``: the mean of its patches, normed."""
        if self.picture_classifier is None or self.picture_norm is None:
            raise ConfigError(lacks(self, "classes of pictures alone", "picture_classes"))
        return self.picture_classifier(self.picture_norm(self.image_states(pictures)[:, 1:].mean(1)))

    def word_head(self, states: Tensor) -> Tensor:
        """``[..., D]`` → ``[..., V]``."""
        if self.word_scores is None:
            raise ConfigError(lacks(self, "masked words", "tasks.words"))
        return self.word_scores(states)

    def code_head(self, states: Tensor) -> Tensor:
        """States of patches ``[..., D]`` → scores of the visual words ``[..., codes]``."""
        if self.code_scores is None:
            raise ConfigError(lacks(self, "visual words", "codes"))
        return self.code_scores(states)

    # ---------------------------------------------------------------------------------------------- two towers

    def embed_images(self, batch: Batch) -> Tensor:
        """The batch's pictures as vectors of unit length ``[B, D]``."""
        return self.image_vectors(pictures_of(batch, 1)[0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """The batch's texts as vectors of unit length ``[B, D]``."""
        return self.text_vectors(words_of(batch))

    def image_vectors(self, pictures: Pictures) -> Tensor:
        """Pictures alone as vectors of unit length ``[B, D]``."""
        if self.image_head is None:
            raise ConfigError(lacks(self, "cosines", "contrast"))
        return _unit(self.image_head(self.image_states(pictures)[:, 0]))

    def text_vectors(self, words: Words) -> Tensor:
        """Texts alone as vectors of unit length ``[B, D]``."""
        if self.text_head is None:
            raise ConfigError(lacks(self, "cosines", "contrast"))
        return _unit(self.text_head(self.text_states(words)[:, 0]))

    def scale(self) -> Tensor:
        """What cosines are multiplied with ``[]``; not bounded, as in the reference."""
        if self.logit_scale is None:
            raise ConfigError(lacks(self, "cosines", "contrast"))
        return self.logit_scale.exp()

    def match(self, batch: Batch) -> Tensor:
        """The cosine of each sample's picture and text ``[B]``."""
        return (self.embed_images(batch) * self.embed_texts(batch)).sum(1)


def _allowed(mask: Tensor, split: int, causal: bool) -> Tensor:
    """``mask [B, S]`` of what is there → ``[B, 1, 1, S]``, or with ``causal`` words ``[B, 1, S, S]``."""
    if not causal:
        return mask[:, None, None, :]
    size = mask.shape[1]
    places = torch.arange(size, device=mask.device)
    picture = places < split
    order = (places[None, :] <= places[:, None]) & ~picture[:, None]  # words see what stands before them
    return (order | picture[None, :])[None, None] & mask[:, None, None, :]  # [B, 1, S, S]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
