"""From what a language model gives to the slots of a picture back to the picture: the same way, walked backwards.

Each step forward (tiles joined, borders cut, rows ended, maps pooled, patches joined) is arithmetic, so its way back is
its own gradient: what a slot got is handed to the vectors it was made of, in the parts in which it was made of them.
Nothing has to be written twice, and a new merge or pool can be walked back without a line here. What lies on newline
vectors, on padding or outside the picture goes to no place in it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.fusion.cross_attention import CrossAttention as Gated
from chiasm.fusion.gated import GatedBlock, Sight
from chiasm.fusion.splice import Splice
from chiasm.nn.cross_attention import CrossAttention
from chiasm.nn.watch import shares
from chiasm.processing.base import Place
from chiasm.processing.view import View
from chiasm.types import Batch, Count, MediaBatch, MediaItem, Tokens

CANVAS = 128  # cells on the longer side of the map laid over a picture


def to_units(
    model: Splice, kind: str, media: MediaBatch, named: dict[str, Any], runs: Sequence[Tensor]
) -> Tensor | None:
    """What the slots of each medium got (``[M]`` each) → what the places of each unit got, ``[U, rows, columns]``.

    ``named`` are the intermediates of a run of ``model`` on this very batch. None where the connector does not tell
    which of its vectors comes from where.
    """
    stream = model.config.stream(kind)
    projected: Tokens = named[f"{kind}/projected"]
    handed = _back(
        lambda x: torch.cat(model.merge(kind, media, replace_x(projected, x), [])), projected.x, torch.cat(list(runs))
    )
    features: Tokens | Mapping[str, Tokens] = named[f"{kind}/features"]
    if projected.grid is not None and not model.config.connectors[stream.connector].joins_units:
        if stream.pool is None or stream.pool_at == "after" or isinstance(features, Mapping):
            return handed.unflatten(1, projected.grid)
        if stream.pool.count(Count(features.x.shape[1], features.grid)).grid != projected.grid:
            return handed.unflatten(1, projected.grid)
        given: Tokens = features
        return on_grid(_back(lambda x: stream.pool.apply(replace_x(given, x)).x, given.x, handed), given)  # type: ignore[union-attr]
    if isinstance(features, Mapping) or stream.pool is not None:
        return None
    seen = crossed(model, kind, media, features)
    return None if seen is None else on_grid(torch.einsum("uk,ukn->un", handed, seen), features)


def crossed(model: Splice, kind: str, media: MediaBatch, features: Tokens) -> Tensor | None:
    """How a connector's queries share their attention over a unit's vectors: ``[U, K, N]``, mean of heads and layers.

    It is read from every ``CrossAttention`` of the connector in which as many queries as it gives vectors look at the
    unit's vectors (and perhaps, after them, at themselves). None where there is none.
    """
    config = model.config.stream(kind)
    connector = model.connectors[config.connector]
    units, count = features.x.shape[:2]
    queries = model.config.unit_count(kind, media.layouts[0].shape).tokens
    found: list[Tensor] = []

    def keep(asked: Tensor, source: Tensor | None, weights: Tensor) -> None:
        if source is not None and asked.shape[:2] == (units, queries) and source.shape[1] >= count:
            found.append(weights[:, :, :count])

    with torch.no_grad(), watched(connector, keep):
        connector(*model._handed(config, media, {config.encoders[0]: features}, [""] * len(media.owners)))
    return torch.stack(found).mean(dim=0) if found else None


class watched:
    """While it lasts, ``keep(asked, source, shares [B, T, L])`` is told of every ``CrossAttention`` of ``module``.

    Only calls of the thread that opened it count: a server may run the same module in another one.
    """

    kind: type[nn.Module] = CrossAttention

    def __init__(self, module: nn.Module, keep: Any):
        self.module, self.keep, self.thread = module, keep, threading.get_ident()

    def __enter__(self) -> None:
        parts = [part for part in self.module.modules() if isinstance(part, self.kind)]
        self.handles = [part.register_forward_pre_hook(self._seen, with_kwargs=True) for part in parts]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _seen(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            self.look(part, *args, **kwargs)

    def look(
        self, part: Any, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None, *_: Any, **rest: Any
    ) -> None:
        """What a call of ``part`` with these arguments attends to."""
        q, k = part.compared(x, source)
        self.keep(x, source, shares(q, k, mask).mean(dim=1))


class watched_gates(watched):
    """The same for the gated blocks between a language model's layers, which look at media."""

    kind = GatedBlock

    def look(self, part: Any, x: Tensor, media: Any, sight: Sight) -> None:  # type: ignore[override]
        """Positions that see no medium share nothing."""
        k, _ = part.keys_values(media) if isinstance(media, Tensor) else media
        seen = shares(part.queries(x), k, sight.mask).mean(dim=1)  # [B, T, L]
        self.keep(x, media, seen.masked_fill(sight.blind, 0))


def through_gates(model: Gated, batch: Batch, rows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """How the positions ``rows`` of a batch of one look at each medium through the gated blocks: ``[M]`` for each.

    Media are in the order of their kinds. Also the run's intermediates. Blocks and positions are averaged.
    """
    found: list[Tensor] = []
    with torch.no_grad(), watched_gates(model.cross, lambda x, media, seen: found.append(seen[0, rows].mean(dim=0))):
        named = model(batch, logits=None).named
    lengths = [length for _, length, _ in named["media"][0]]
    each = torch.stack(found).mean(dim=0)  # [L]
    return list(each[: sum(lengths)].split(lengths)), named


def on_grid(values: Tensor, tokens: Tokens) -> Tensor | None:
    """``values [U, N]`` → ``[U, rows, columns]``. Units are squares; a class vector in front has no place in them."""
    count = values.shape[1]
    if tokens.grid is not None:
        return values.unflatten(1, tokens.grid)
    for lead in (0, 1):
        side = math.isqrt(count - lead)
        if side * side == count - lead and side:
            return values[:, lead:].unflatten(1, (side, side))
    return None


def paint(units: Tensor, views: Sequence[View], size: tuple[int, int], longest: int = CANVAS) -> Tensor:
    """Heat on the places of each unit ``[U, rows, columns]`` → heat on the picture ``[height', width']``.

    ``views`` says where a picture of ``size`` (height, width) lies in each unit. A place's heat is spread evenly over
    the part of the picture that it shows; what several units show adds up. The sum is the units' own, less what lies
    outside the picture.
    """
    height, width = size
    scale = min(1.0, longest / max(height, width))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    grid = units.shape[1:]
    canvas = torch.zeros(shape)
    for unit, view in zip(units.float().cpu(), views, strict=True):
        down = _shared(shape[0], height, grid[0], view.scale_y, view.top)  # [height', rows]
        across = _shared(shape[1], width, grid[1], view.scale_x, view.left)  # [width', columns]
        canvas += down @ unit @ across.T
    return canvas


def _shared(cells: int, length: int, places: int, scale: float, shift: float) -> Tensor:
    """How much of a unit's ``places`` along one side the picture's ``cells`` show: ``[cells, places]``, 0 to 1."""
    edges = (torch.arange(cells + 1, dtype=torch.float64) * (length / cells) * scale + shift) * places
    low, high = edges[:-1, None], edges[1:, None]
    start = torch.arange(places, dtype=torch.float64)
    return (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp_min(0).float()


def canvases(front_end: Any, item: MediaItem, place: Place, units: Tensor) -> list[Tensor]:
    """The maps of a medium: one for a picture, one for each frame of a clip."""
    height, width = item.layout.original
    original = (height or units.shape[1], width or units.shape[2])
    still = getattr(front_end, "views", None)
    if still is not None:
        return [paint(units, still(original, place), original)]
    frames = getattr(front_end, "image", None)
    view = frames.views(original, Place(place.sample, 0, 1))[0] if frames else View(1 / original[1], 1 / original[0])
    return [paint(unit[None], [view], original) for unit in units]


def replace_x(tokens: Tokens, x: Tensor) -> Tokens:
    """The same tokens with other vectors."""
    return Tokens(x, tokens.mask, tokens.grid, tokens.runs)


def _back(step: Any, x: Tensor, heat: Tensor) -> Tensor:
    """``heat [..., M]`` on the vectors ``step(x) [..., M, D]`` → heat ``[U, N]`` on the vectors ``x [U, N, D]``."""
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        made = step(leaf)
        told = heat.to(made).unsqueeze(-1).expand_as(made) / made.shape[-1]
        (slope,) = torch.autograd.grad(made, leaf, told)
    return slope.sum(dim=-1)  # [U, N]
