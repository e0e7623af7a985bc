"""The contract of models that look at a picture and read a text together, and write nothing.

Words stand in ``Batch.input_ids``, pictures in ``Batch.media`` without slots: a picture takes no place in the text.
Such a model classifies (``classify``), judges whether words and picture belong together (``match``), and fills masked
words (``fill``). Objectives recombine words and pictures of a batch, so both can be picked by rows.

Letters: ``B`` samples, ``T`` words, ``N`` vectors of a picture, ``D`` width, ``C`` classes, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from chiasm.errors import ConfigError, DataError, nearest
from chiasm.fusion.base import Asked, Fusion, FusionConfig
from chiasm.types import Batch, Layout, MediaBatch, Output


@dataclass
class Words:
    """Texts, padded on the right."""

    ids: Tensor  # [B, T] long
    mask: Tensor  # [B, T] bool, False at padding

    def pick(self, rows: Tensor) -> Words:
        """The texts of ``rows [n]``."""
        return Words(self.ids[rows], self.mask[rows])


@dataclass
class Pictures:
    """One picture a sample. Those below the largest are filled with zeros on the right and below."""

    pixels: Tensor  # [B, 3, height, width]
    sizes: list[tuple[int, int]]  # (height, width) of each picture without what it was filled with

    def pick(self, rows: Tensor) -> Pictures:
        """The pictures of ``rows [n]``."""
        return Pictures(self.pixels[rows], [self.sizes[row] for row in rows.tolist()])


@dataclass
class Joint:
    """States of words and picture. ``order`` says where each stands in ``hidden``."""

    hidden: Tensor  # [B, T + N, D]
    mask: Tensor  # [B, T + N] bool
    words: slice
    picture: slice
    pooled: Tensor | None = None  # [B, D]
    named: dict[str, Any] = field(default_factory=dict)


class PairConfig(FusionConfig):
    """A model of words and pictures. ``images`` is how many pictures a sample has (NLVR2: 2)."""

    images: PositiveInt = 1
    text_vocab: PositiveInt = 30522

    @property
    def vocab(self) -> int:
        """Rows of the table that token ids are looked up in."""
        return self.text_vocab

    @property
    def media(self) -> dict[str, str]:
        """The kinds of media that the model takes."""
        return {"image": "image"}

    def count(self, kind: str, layout: Layout) -> int:
        """None: a picture stands beside the text. Raises ConfigError for a kind it does not take."""
        if kind not in self.media:
            raise ConfigError(f"this model takes no {kind}; {nearest(kind, self.media)}")
        return 0


class PairModel(Fusion):
    """Words and pictures to joint states, and the heads over them."""

    config: PairConfig
    recompute = False  # training: each block's inner states are computed again on the way back, not kept
    bias: Tensor | None = None  # what is added to scaled cosines: SigLIP has it, none of these

    def scale_bounds(self) -> dict[str, tuple[float, float]]:
        """Of models that compare vectors: none is held by the loop (ALBEF's loss holds its own)."""
        return {}

    # ---------------------------------------------------------------------------------------------- to implement

    def joint(self, words: Words, pictures: Pictures, place: int = 0) -> Joint:
        """Words and one picture each → joint states; ``place`` is the picture's number in its sample."""
        raise NotImplementedError

    def class_logits(self, words: Words, pictures: Sequence[Pictures]) -> Tensor:
        """Scores of the classes ``[B, C]`` before any softmax. Raises ConfigError where the model has no such head."""
        raise ConfigError(lacks(self, "classes", "tasks.classes"))

    def match_logits(self, joint: Joint) -> Tensor:
        """``[B, 2]``: does not match, matches. Raises ConfigError where the model has no such head."""
        raise ConfigError(lacks(self, "matches", "tasks.match"))

    def word_head(self, states: Tensor) -> Tensor:
        """States of words ``[..., D]`` → ``[..., V]``. Raises ConfigError where the model has no such head."""
        raise ConfigError(lacks(self, "masked words", "tasks.words"))

    # ---------------------------------------------------------------------------------------------- given

    def match(self, batch: Batch) -> Tensor:
        """How well each sample's words and picture match, ``[B]``; more is better. For ranking, not a probability."""
        words, pictures = self.read(batch)
        return self.match_logits(self.joint(words, pictures[0]))[:, 1]  # [B]

    def classify(self, batch: Batch) -> Tensor:
        """Scores of the classes ``[B, C]``."""
        return self.class_logits(*self.read(batch))

    def fill(self, batch: Batch) -> Tensor:
        """Logits of every word ``[B, T, V]``."""
        words, pictures = self.read(batch)
        joint = self.joint(words, pictures[0])
        return self.word_head(joint.hidden[:, joint.words])

    def read(self, batch: Batch) -> tuple[Words, list[Pictures]]:
        """The words and the pictures of a batch, first pictures first. Raises DataError that names the sample."""
        return words_of(batch), pictures_of(batch, self.config.images)

    def forward(self, batch: Batch, logits: Asked | None = "labels", cache: Any = None) -> Output:
        """Batch ``[B, T]`` → ``Output``: hidden ``[B, T + N, D]`` with the sample's first picture, pooled by name."""
        words, pictures = self.read(batch)
        joint = self.joint(words, pictures[0])
        named = joint.named | {
            "text/states": joint.hidden[:, joint.words],
            "image/states": joint.hidden[:, joint.picture],
            "mask": joint.mask,
            "pooled": joint.pooled,
        }
        return Output(joint.hidden, named=named)

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        """Such a model writes no text ``[B, V]``: raises ConfigError."""
        raise ConfigError(SILENT)

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Such a model writes no text: raises ConfigError."""
        raise ConfigError(SILENT)

    def check_counts(self, shapes: Any) -> None:
        """Run one text of two words and a picture of each shape (meta device). Raises ConfigError or DataError."""
        for shape in shapes.values():
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            pictures = Pictures(torch.empty(1, *shape, device=self.device), [(shape[-2], shape[-1])])
            self.joint(Words(ids, torch.ones_like(ids, dtype=torch.bool)), pictures)


SILENT = (
    "this model reads words and a picture and writes no text: use classify or match, or load a model that generates"
)


def lacks(model: PairModel, what: str, key: str) -> str:
    """The message for a head that is not there."""
    return f"this {model.config.type} model has no head for {what}; set model.{key}, and train it"


def words_of(batch: Batch) -> Words:
    """The texts of a batch. Raises DataError where one is empty, packed with others or padded on the left."""
    mask = batch.segment_ids != 0  # [B, T]
    if len(batch.ids) not in (0, len(mask)):
        raise DataError(
            f"{len(batch.ids)} samples stand in {len(mask)} rows: a model that looks at words and picture together "
            "takes one sample a row; set pack to false"
        )
    if mask.shape[1] == 0 or not bool(mask[:, 0].all()):
        row = 0 if mask.shape[1] == 0 else int((~mask[:, 0]).nonzero()[0])
        raise DataError(
            f"sample {name_of(batch, row)!r}: has no text at position 0; give it a text, and pad on the right"
        )
    return Words(batch.input_ids, mask)


def pictures_of(batch: Batch, images: int) -> list[Pictures]:
    """The first picture of all samples, then the second. Raises DataError where a sample has more or fewer."""
    media: MediaBatch | None = batch.media.get("image")
    owners = media.owners if media is not None else []
    for row in range(len(batch.input_ids)):
        if owners.count(row) != images:
            raise DataError(
                f"sample {name_of(batch, row)!r}: has {owners.count(row)} pictures, this model takes {images} with "
                "each text"
            )
    assert media is not None
    for layout, owner in zip(media.layouts, owners, strict=True):
        if layout.units != 1:
            raise DataError(
                f"sample {name_of(batch, owner)!r}: its picture was cut into {layout.units} units, this model reads 1; "
                "take the tiling out of the front end"
            )
    sizes = [(layout.shape[-2], layout.shape[-1]) for layout in media.layouts]
    rows = sorted(range(len(owners)), key=lambda item: owners[item])  # stable: pictures keep their order
    found = []
    for place in range(images):
        mine = rows[place::images]
        found.append(Pictures(media.inputs[mine], [sizes[item] for item in mine]))
    return found


def name_of(batch: Batch, row: int) -> str:
    """The id of a row's sample."""
    return batch.ids[row] if row < len(batch.ids) else str(row)
