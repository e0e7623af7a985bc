"""Media of several sizes in one batch: each size is encoded by itself, so that no padding is taken for a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from chiasm.types import Condition, MediaBatch, Tokens


def alike(media: MediaBatch, encoders: Mapping[str, Any]) -> Iterator[tuple[list[int], MediaBatch]]:
    """The media of each size, with their numbers among all, cut to that size. ``encoders`` are configurations by name.

    Where all are of one size, as tiles and frames are, that is the batch as it came. ``slots`` stay those of all.
    """
    shapes = [layout.shape for layout in media.layouts]
    if len(set(shapes)) <= 1:
        yield list(range(len(shapes))), media
        return
    starts = [sum(layout.units for layout in media.layouts[:i]) for i in range(len(shapes))]
    for shape in dict.fromkeys(shapes):
        items = [i for i, other in enumerate(shapes) if other == shape]
        rows = torch.tensor([starts[i] + j for i in items for j in range(media.layouts[i].units)])
        rows = rows.to(media.slots.device)
        part: Any = (rows, *map(slice, shape))
        inputs = media.inputs[part] if media.features is None else media.inputs
        features = media.features and {
            name: _cut(tokens, rows, encoders[name].count(shape).tokens) for name, tokens in media.features.items()
        }
        yield (
            items,
            replace(
                media,
                inputs=inputs,
                layouts=[media.layouts[i] for i in items],
                counts=[media.counts[i] for i in items],
                owners=[media.owners[i] for i in items],
                keys=[media.keys[i] for i in items] if media.keys else [],
                features=features,
                cond=media.cond and Condition(media.cond.ids[items], media.cond.mask[items]),
            ),
        )


def look(encoder: Any, media: MediaBatch) -> Tokens:
    """What an encoder makes of units of one size ``[U, *shape]``: ``Tokens(x [U, N, D])``, all of which count."""
    if not encoder.reads_layouts:
        return encoder(media.inputs)  # type: ignore[no-any-return]
    layouts = [layout for layout in media.layouts for _ in range(layout.units)]
    return replace(encoder(media.inputs, layouts), mask=None)


def all_sizes(encoder: Any, media: MediaBatch) -> Tokens:
    """What an encoder makes of a whole batch. One of many sizes is told each layout; its mask says what counts."""
    return encoder(media.inputs, media.layouts) if encoder.reads_layouts else encoder(media.inputs)  # type: ignore[no-any-return]


def _cut(tokens: Tokens, rows: torch.Tensor, count: int) -> Tokens:
    return replace(tokens, x=tokens.x[rows, :count], mask=None)  # [u, N, D]
