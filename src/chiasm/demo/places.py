"""The objective by which the demo's tower learns to see: what is at each of the nine places of a picture?

The connector's vectors around a place are averaged and put through the head of the frozen language model; they shall
give the words of what is there (``small``, ``red``, ``circle``), or ``no``. So every place of every picture teaches the
tower, where a caption's loss must first discover which word belongs to which part of the picture.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.data.sources.playground import TASKS, Playground
from chiasm.data.sources.playground.scenes import Scene
from chiasm.errors import DataError
from chiasm.fusion.base import Fusion
from chiasm.lm.tokenizer import Tokenizer
from chiasm.train.objectives.base import Loss
from chiasm.types import Batch

TOKENIZER = Path(__file__).parent.parent / "weights" / "tiny-lm"
EMPTY = "no"


def places(model: Fusion, batch: Batch) -> Loss:
    """Cross-entropy with the words of each place in equal shares, less what no answer could avoid; weight: places.

    Pictures that are no scenes (charts, signs) and pictures of pairs count for nothing.
    """
    media = batch.media["image"]
    scenes = [scene_of(batch.ids[owner]) for owner in media.owners]
    rows = [i for i, scene in enumerate(scenes) if scene is not None]
    named: dict[str, Any] = {}
    model.encode("image", media, batch.ids, named)  # type: ignore[operator]
    tokens = named["image/projected"]
    grid = tokens.x.transpose(1, 2).unflatten(2, tokens.grid)  # [U, D, rows, columns]
    vectors = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)[rows]  # [U', 9, D]
    logits = model.lm.head(model.lm.norm(vectors)).float()  # type: ignore[union-attr, operator, arg-type]  # [U', 9, V]
    if not rows:
        return Loss(logits.sum(), 0)
    wanted = torch.stack([shares(scenes[i] or (), logits.shape[-1]) for i in rows]).to(logits.device)  # [U', 9, V]
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), reduction="sum")
    floor = -(wanted * wanted.clamp_min(1e-9).log()).sum()
    return Loss(losses - floor, float(wanted.shape[0] * wanted.shape[1]))


def shares(scene: Scene, vocab: int) -> Tensor:
    """The words of each place ``[9, V]``, in equal shares."""
    at = {thing.place: thing.words.split() for thing in scene}
    wanted = torch.zeros(9, vocab)
    for place in range(9):
        words = at.get(place, [EMPTY])
        for word in words:
            wanted[place, word_id(word)] += 1 / len(words)
    return wanted


def scene_of(sample: str) -> Scene | None:
    """The scene of a playground example, made again from the example's id; None where its picture is no scene.

    Raises DataError for examples of other sources.
    """
    fields = sample.split("/")
    if len(fields) != 6 or fields[0] != "playground":
        raise DataError(
            f"sample {sample!r}: the places objective needs examples of the playground, and knows them by id"
        )
    if TASKS[fields[3]].family.name not in ("scene", "digit", "crowd"):
        return None
    number = int(fields[5])
    config = {"split": fields[1], "seed": int(fields[2]), "tasks": (fields[3],), "length": number + 1}
    return Playground(Playground.Config.parse(config)).compose(number)[0]


@cache
def word_id(word: str) -> int:
    """The only token of a word of the playground."""
    ids = _tokenizer().encode(word)
    if len(ids) != 1:
        raise DataError(
            f"the word {word!r} has {len(ids)} tokens in {TOKENIZER}, 1 was expected; train the tokenizer again"
        )
    return ids[0]


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)
