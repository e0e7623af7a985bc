"""Where a model looked, as pictures: heat laid over what was asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chiasm.fusion.splice import Splice
from chiasm.infer.heat import crossed, on_grid
from chiasm.processing.base import Place
from chiasm.processing.messages import parse
from chiasm.processing.open import open_picture
from chiasm.types import Batch, Tokens

if TYPE_CHECKING:
    from chiasm.vlm import VLM

LONGEST = 320  # pixels of a shown picture's longer side
# Heat from nothing to all: colour, and how much of the picture it covers (0 to 255).
_STOPS = np.array([[20, 10, 60, 90], [90, 20, 130, 150], [210, 50, 90, 190], [250, 140, 30, 215], [255, 240, 120, 235]])


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


def by_queries(vlm: VLM, batch: Batch, named: dict[str, Any], units: Sequence[Any]) -> dict[str, Image.Image]:
    """For each kind of media whose connector looks with queries: its first unit with the mean of their attention."""
    model = vlm.model
    if not isinstance(model, Splice):
        return {}
    found = {}
    for kind, media in batch.media.items():
        features = named.get(f"{kind}/features")
        if not isinstance(features, Tokens) or model.config.stream(kind).pool is not None:
            continue
        seen = crossed(model, kind, media, features)
        placed = None if seen is None else on_grid(seen.mean(dim=1), features)  # [U, rows, columns]
        if placed is not None and units:
            found[kind] = overlay(units[0].picture, placed[0])
    return found


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
