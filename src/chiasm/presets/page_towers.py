"""What the page of a model of two towers, and ``chiasm show``, say of the way of a picture and of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chiasm.errors import DataError
from chiasm.fusion.dual_tower import DualTower
from chiasm.model_config import VLMConfig
from chiasm.presets.anatomy import PICTURE, Step

CLEANED = {
    "none": "as they are",
    "lower": "made lower case",
    "clip": "mended by ftfy, HTML entities resolved, white space collapsed, made lower case",
    "siglip": "made lower case, ASCII punctuation taken out, white space collapsed",
}
FITS = {"crop": "shorter side resized, centre cut out", "squash": "stretched to a square", "pad": "padded to a square"}


def steps(config: VLMConfig, which: str) -> list[Step]:
    """The way of a picture (``"image"``) or of a text (``"text"``) to its vector."""
    model: Any = config.model
    encoder, connector = model.encoders[which], model.connectors[which]
    if which == "text":
        template: Any = config.processing.template
        shape: tuple[int | str, ...] = (1, template.length if template.fill else "n")
        found = [Step("tokens of the text", shape), Step(f"encoders.text ({encoder.type})", (*shape, encoder.dim))]
    else:
        front: Any = config.processing.media["image"]
        if front.type == "naflex":
            return [*_patches(front, encoder), *_vector(model, which, connector)]
        unit = front.unit_shape
        found = [
            Step(FITS[front.fit] + (", centre cut out" if front.fit == "squash" and front.edge != front.size else ""),
                 (1, *unit)),
            Step(f"encoders.image ({encoder.type})", (1, encoder.count(unit).tokens, encoder.dim)),
        ]  # fmt: skip
    return [*found, *_vector(model, which, connector)]


def _vector(model: Any, which: str, connector: Any) -> list[Step]:
    if not isinstance(model, DualTower.Config):
        return [Step(f"connectors.{which} ({connector.type}, {connector.pool})", (1, 1, model.classes))]
    pool = getattr(connector, "pool", "attention")
    return [Step(f"connectors.{which} ({connector.type}, {pool})", (1, 1, model.dim)),
            Step("unit length", (1, model.dim))]  # fmt: skip


def _patches(front: Any, encoder: Any) -> list[Step]:
    """The example picture at its own proportions."""
    rows, columns = front.grid(PICTURE[1], PICTURE[0])
    return [
        Step(f"resized to {rows} x {columns} patches of {front.patch} pixels, of at most {front.patches}",
             (1, rows * columns, front.patch**2 * 3)),
        Step(f"encoders.image ({encoder.type})", (1, rows * columns, encoder.dim)),
    ]  # fmt: skip


def compared(model: DualTower.Config) -> str:
    """How a picture and a text are scored, in words."""
    scale = "exp(logit_scale)" if model.scale == "log" else "1 / temperature"
    bias = "" if model.bias_init is None else f" + bias, which starts at {model.bias_init:g}"
    bound = "" if model.max_scale is None else f", at most {model.max_scale:g}"
    return f"score = {scale} x cosine{bias}; the scale starts at {model.scale_init:.5g}{bound}."


def texts(config: VLMConfig) -> str:
    """How texts are read, in words."""
    template: Any = config.processing.template
    filled = ", always filled to that length with padding that the tower reads" if template.fill else ""
    return f"Texts are {CLEANED[template.clean]}; at most {template.length} tokens{filled}."


def other_sizes(config: VLMConfig, sides: Sequence[int] = (224, 336, 448)) -> list[tuple[str, str]]:
    """Vectors of the tower before it is pooled, for squares of other sizes; empty where the tower reads no other."""
    tower = config.model.encoders["image"]  # type: ignore[attr-defined]
    rows = []
    for side in sides:
        try:
            rows.append((f"{side} x {side}", str(tower.count((3, side, side)).tokens)))
        except DataError:
            continue
    return rows


__all__ = ["PICTURE", "compared", "other_sizes", "steps", "texts"]
