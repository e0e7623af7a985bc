"""Where a model looked, as pictures: heat laid over what was asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from chiasm.fusion.splice import Splice
from chiasm.infer.heat import crossed, on_grid
from chiasm.nn.modes import evaluating
from chiasm.processing.base import Place
from chiasm.processing.messages import parse
from chiasm.processing.open import open_picture
from chiasm.processing.shown import pictures
from chiasm.types import Batch, MediaItem, Tokens

if TYPE_CHECKING:
    from chiasm.vlm import VLM

LONGEST = 320  # pixels of a shown picture's longer side
CELL, GAP, LABEL, ACROSS = 84, 6, 16, 9  # of a sheet: a picture's side, white between, the line above it, in a row
MOST_QUERIES = 64  # of a sheet
# Heat from nothing to all: colour, and how much of the picture it covers (0 to 255).
_STOPS = np.array([[60, 20, 120, 0], [100, 20, 130, 80], [210, 50, 90, 140], [250, 130, 30, 180], [255, 220, 50, 205]])


@dataclass(frozen=True)
class Looked:
    """A picture with the heat of some words over it, and a line about it."""

    title: str
    note: str
    picture: Image.Image


def looked(vlm: VLM, messages: Sequence[Any], answer: str, words: Sequence[str | int | None]) -> list[Looked]:
    """Each picture with its heat, for each of ``words`` of ``answer`` (None: all). Raises DataError, ConfigError."""
    media = [medium for message in parse(messages) for medium in message.media]
    pictures = [medium.data for medium in media if medium.kind == "image"]
    found = []
    for word in words:
        result = vlm.look(messages, answer, word)
        for heat in result.heats:
            if heat.kind != "image":
                continue
            of = "of all attention" if result.method == "attention" else "of all heat"
            note = f"{result.method}; picture {heat.index + 1}: {100 * heat.share:.0f} % {of}"
            base = open_picture(pictures[heat.index], Place("look", heat.index, len(pictures)))
            found.append(
                Looked("the whole answer" if word is None else result.word.text, note, overlay(base, heat.values))
            )
    return found


def by_queries(
    vlm: VLM, batch: Batch, named: dict[str, Any], shown: Mapping[str, Image.Image], across: int = ACROSS
) -> dict[str, Image.Image]:
    """For each kind of media whose connector looks with queries: what each of them looks at, in its first unit.

    ``named`` are the intermediates of a run on ``batch``, ``shown`` each kind's first unit as a picture, ``across``
    the small pictures in a row.
    """
    model = vlm.model
    if not isinstance(model, Splice):
        return {}
    found = {}
    for kind, media in batch.media.items():
        features = named.get(f"{kind}/features")
        if not isinstance(features, Tokens) or model.config.stream(kind).pool is not None or kind not in shown:
            continue
        seen = crossed(model, kind, media, features)
        placed = None if seen is None else on_grid(seen[0], features)  # [K, rows, columns]
        if placed is not None:
            found[kind] = sheet(shown[kind], placed, across)
    return found


def queries_of(vlm: VLM, messages: Sequence[Any], id: str = "", across: int = ACROSS) -> dict[str, Image.Image]:
    """The same for a conversation: its media run through encoder and connector alone. Raises DataError."""
    model = vlm.model
    if not isinstance(model, Splice):
        return {}
    sample = vlm.processor(messages, id=id, add_generation_prompt=True)
    batch = vlm.processor.collate([sample]).to(model.device, model.dtype)
    shown: dict[str, Image.Image] = {}
    for item in sample.media:
        if item.kind not in shown and (pictures := unit_pictures(vlm, item)):
            shown[item.kind] = pictures[0]
    named: dict[str, Any] = {}
    with evaluating(model) if model.training else torch.no_grad(), torch.no_grad():
        for kind, media in batch.media.items():
            model.encode(kind, media, batch.ids, named)
        return by_queries(vlm, batch, named, shown, across)


def unit_pictures(vlm: VLM, item: MediaItem) -> list[Image.Image]:
    """Each unit of a medium with three channels as a picture, the normalisation undone; none for other media."""
    return pictures(vlm.processor.config.media[item.kind], item.layout, item.inputs)


def sheet(picture: Image.Image, maps: Tensor, across: int = ACROSS) -> Image.Image:
    """``maps [K, rows, columns]`` over a picture, side by side: the picture, the mean of all, and each by its number.

    Each is as bright as its own brightest place, whose share of the query's attention stands beside the number: small
    where a query looks everywhere alike. Sheets show where a query looks, not how much it counts.
    """
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    smooth = Image.Resampling.NEAREST if max(picture.size) < CELL else Image.Resampling.BICUBIC
    base = picture.convert("RGB").resize(size, smooth)
    cells, mean = [("picture", base)], maps.mean(dim=0)
    for name, values in [("mean", mean), *((str(i + 1), m) for i, m in enumerate(maps[:MOST_QUERIES]))]:
        cells.append((f"{name}: {100 * float(values.max()):.0f} %", overlay(base, values)))
    down = -(-len(cells) // across)
    across = -(-len(cells) // down)  # rows of one length, as far as they go
    width, height = size[0] + GAP, size[1] + LABEL + GAP
    page = Image.new("RGB", (across * width - GAP, down * height - GAP), "white")
    draw = ImageDraw.Draw(page)
    for place, (label, cell) in enumerate(cells):
        left, top = place % across * width, place // across * height
        draw.text((left + size[0] / 2, top + LABEL / 2), label, fill=(70, 70, 80), anchor="mm")
        page.paste(cell, (left, top + LABEL))
    return page


def overlay(picture: Image.Image, values: Tensor, strength: float = 1.0) -> Image.Image:
    """``values [rows, columns]`` as colour over a picture; the largest is the brightest."""
    base = picture.convert("RGB")
    base.thumbnail((LONGEST, LONGEST))
    heat = values.float().cpu()
    heat = heat / heat.max() if float(heat.max()) > 0 else torch.zeros_like(heat)
    places = heat.numpy() * (len(_STOPS) - 1)
    low = np.clip(places.astype(int), 0, len(_STOPS) - 2)
    part = (places - low)[..., None]
    colours = (_STOPS[low] * (1 - part) + _STOPS[low + 1] * part).round().astype(np.uint8)  # [rows, columns, 4]
    scaled = Image.fromarray(colours).resize(base.size, Image.Resampling.NEAREST)
    cover = scaled.getchannel("A").point(lambda value: round(value * strength))
    base.paste(scaled.convert("RGB"), mask=cover)
    return base
