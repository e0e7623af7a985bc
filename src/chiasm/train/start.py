"""Where fine-tuning begins: the tensors of a trained model in a model with other heads, every exception named.

A pre-trained ViLT has heads for words and matching, its fine-tuned form has one for answers. The two share a body; what
the one has more and what the other lacks is written in the recipe, and anything beyond it is an error. Tables of places
are carried to another size of pictures as the authors do: bicubic for ALBEF and BEiT-3, VLMo's by splines; a third row
of kinds, for second pictures, begins as the second (ViLT, VLMo)::

    model:
      preset: vilt-b32-vqa
      start: {folder: models/vilt-b32-mlm-itm, fresh: [classifier], left: [word_scores, match_scores]}
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chiasm.config import Config
from chiasm.convert.maps_vlmo import carried as spread
from chiasm.errors import CheckpointError
from chiasm.train.plan import matches


class Start(Config):
    """``folder``: a model that ``chiasm.load`` opens. Patterns as in a plan: ``fresh`` are tensors of the new model
    that it does not give, ``left`` those of its own that go nowhere. ``copies``: a dotted prefix of the new model → the
    one of the folder that it begins as (ALBEF's decoder: ``decoder.blocks: body.fusion``).
    """

    folder: str
    copies: dict[str, str] = Field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def is_fresh(self, name: str) -> bool:
        """Whether a tensor of the new model keeps its first, random values."""
        return any(matches(pattern, name) for pattern in self.fresh)


def begin(model: nn.Module, start: Start) -> int:
    """Fill ``model`` from the folder; gives the number of tensors.

    Raises CheckpointError with the tensors on either side that nothing names, shapes that differ, idle patterns.
    """
    from chiasm import vlm

    trained = vlm.load(start.folder, dtype=torch.float32).model
    given, wanted = trained.state_dict(), model.state_dict()
    own = dict(given)
    for new, old in start.copies.items():
        twins = {new + name[len(old) :]: tensor for name, tensor in own.items() if name.startswith(old + ".")}
        if not twins or not twins.keys() <= wanted.keys():
            raise CheckpointError(f"model.start.copies: {new!r} does not hold what {old!r} of the folder holds")
        given |= twins
    for name in wanted.keys() & given.keys():
        if given[name].shape != wanted[name].shape:
            given[name] = resized(name, given[name], wanted[name], trained.config, model.config)
    fresh = {name for name in wanted if start.is_fresh(name)}
    left = {name for name in given if any(matches(pattern, name) for pattern in start.left)}
    lacking = sorted(wanted.keys() - given.keys() - fresh)
    surplus = sorted(given.keys() - wanted.keys() - left)
    shared = (wanted.keys() & given.keys()) - fresh - left
    shapes = [f"{n} {list(given[n].shape)} → {list(wanted[n].shape)}" for n in sorted(shared)
              if given[n].shape != wanted[n].shape]  # fmt: skip
    for found, told in (
        (lacking, "tensors of the model that the folder lacks; name them under fresh if they shall begin random"),
        (surplus, "tensors of the folder that the model has no place for; name them under left to drop them"),
        (shapes, "tensors of another shape; choose sizes that agree, or name them under fresh"),
    ):
        if found:
            listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise CheckpointError(f"model.start {start.folder}: {len(found)} {told}: {listed}")
    _used(start.fresh, wanted, "fresh", "the model")
    _used(start.left, given, "left", "the folder")
    with torch.no_grad():
        for name in shared:
            wanted[name].copy_(given[name])
    after = getattr(model, "after_start", None)
    if after is not None:  # a fresh head may begin with what another head has learned
        after(fresh)
    return len(shared)


def resized(name: str, old: Tensor, new: Tensor, before: Any, after: Any) -> Tensor:
    """A table ``[rows, D]`` for another number of rows, where there is a published way; else the table as it is."""
    if old.ndim != 2 or old.shape[1] != new.shape[1]:
        return old
    if name == "kinds.weight" and len(new) == len(old) + 1:
        return torch.cat((old, old[-1:]))
    if name == "biases":
        return spread(old, before.image_size // before.patch, after.image_size // after.patch)
    if not name.endswith(("vision.positions", "image_positions")):
        return old
    for first in range(4):  # vectors that have no place in the picture: a class vector, two that BEiT-3 never uses
        side, target = (math.isqrt(len(t) - first) for t in (old, new))
        if side * side + first == len(old) and target * target + first == len(new):
            grid = old[first:].T.reshape(1, -1, side, side)  # [1, D, side, side]
            grid = F.interpolate(grid.float(), (target, target), mode="bicubic", align_corners=False)
            return torch.cat((old[:first], grid.flatten(2)[0].T.to(old.dtype)))  # [rows, D]
    return old


def _used(patterns: tuple[str, ...], names: Any, key: str, where: str) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise CheckpointError(f"model.start.{key}: {pattern!r} means no tensor of {where}; take it out")
