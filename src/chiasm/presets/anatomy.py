"""A configuration taken apart: its parts with their sizes, the way of a picture with its shapes, its token counts.

Nothing here is typed in: sizes are counted on a model built on the meta device (shapes without memory), shapes are
those that this model gives, and tokens are what the processor will count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as Pillow

from chiasm import registry
from chiasm.compose import build_model
from chiasm.config import Config
from chiasm.errors import ConfigError
from chiasm.fusion.assembly import blank_condition
from chiasm.fusion.base import Fusion
from chiasm.fusion.classifier import Classifier
from chiasm.fusion.cross_attention import CrossAttention
from chiasm.fusion.dual_tower import DualTower
from chiasm.fusion.merge import SpatialUnpad
from chiasm.fusion.pool import Pool
from chiasm.fusion.splice import Splice
from chiasm.model_config import VLMConfig
from chiasm.processing.base import Place
from chiasm.types import Count, Image, Layout, Media, MediaBatch, Tokens, Video

PICTURE = (640, 480)  # width and height in pixels
SIZES = ((640, 480), (320, 240), (336, 336), (672, 672), (1000, 300), (300, 1000), (1920, 1080), (4000, 3000))
FRAMES = 300  # of the example clip


@dataclass(frozen=True)
class PartRow:
    """A part of a model: its place, registered type, options that differ from the type's own, and parameters."""

    place: str
    type: str
    options: str
    parameters: int


@dataclass(frozen=True)
class Step:
    """One step on the way from a medium to logits; ``shape`` holds numbers, and ``n`` for the number of text tokens."""

    what: str
    shape: tuple[int | str, ...]


def parts(config: VLMConfig, model: Fusion | None = None) -> list[PartRow]:
    """The parts of a model in the order they run. ``model`` spares building it on the meta device."""
    model = model or build_model(config.model, device="meta")
    sizes: dict[str, int] = {}
    places = {f"{kind}.{name}" for kind in ("encoders", "connectors") for name in getattr(config.model, kind, {})}
    for name, parameter in model.named_parameters():
        place = next((p for p in places if name.startswith(p + ".")), name.partition(".")[0])
        sizes[place] = sizes.get(place, 0) + parameter.numel()
    rows = [
        _row(place, _at(config.model, place), sizes.pop(place, 0), _widths(model, place)) for place in _order(places)
    ]
    if hasattr(config.model, "lm"):
        rows.append(_row("lm", config.model.lm, sizes.pop("lm", 0)))
    if "cross" in sizes:
        rows.append(_row("cross", config.model.blocks, sizes.pop("cross"), _places(model)))
    return rows + [
        PartRow(place, "", "one learned vector" if place == "newline" else "", n) for place, n in sizes.items()
    ]


def flow(
    config: VLMConfig, kind: str = "image", picture: tuple[int, int] = PICTURE, model: Fusion | None = None
) -> list[Step]:
    """The way of one picture of (width, height), or of one clip of such frames, to the logits of the next token."""
    model = model or build_model(config.model, device="meta")
    layout = layout_of(config, kind, picture)
    stream = config.model.stream(kind)
    named: dict[str, Any] = {}
    count = config.count(kind, layout)
    vectors = getattr(config.model, "vectors", config.model.count)(kind, layout)
    units = torch.empty(layout.units, *layout.shape, device="meta")
    slots = torch.arange(count, device="meta")
    network: Any = model
    media = MediaBatch(units, [layout], slots, [count], [0])
    if config.model.connectors[stream.connector].conditioned:
        media.cond = blank_condition(1, "meta")
    network.encode(kind, media, ["example"], named)
    connector = f"connectors.{stream.connector} ({config.model.connectors[stream.connector].type})"
    features = named[f"{kind}/features"]
    steps = [Step(_unit_words(config, kind, layout), tuple(units.shape))]
    for name, tokens in (features if isinstance(features, dict) else {stream.encoders[0]: features}).items():
        steps.append(Step(f"encoders.{name} ({config.model.encoders[name].type})", tuple(tokens.x.shape)))
        if stream.pool and stream.pool_at == "before":
            steps.append(_pooled(stream.pool, tokens))
    projected = named[f"{kind}/projected"]
    steps.append(Step(connector, tuple(projected.x.shape)))
    if stream.pool and stream.pool_at == "after":
        steps.append(_pooled(stream.pool, projected))
    (merged,) = named[f"{kind}/merged"]
    width, vocab = network.lm.dim, network.lm.vocab
    words = f"merge {stream.merge.type}: {arithmetic(config, kind, layout)} = {vectors}"
    steps.append(Step(words, tuple(merged.shape)))
    beside = isinstance(config.model, CrossAttention.Config)
    among = "its placeholder among n tokens of text" if beside else "in the slots among n tokens of text"
    steps.append(Step(among, (1, f"n + {count}", width)))
    looks = f", {len(network.places)} blocks look at the {vectors} vectors" if beside else ""
    steps.append(Step(f"lm ({config.model.lm.type}){looks}", (1, f"n + {count}", width)))
    return [*steps, Step("head, at the last position", (1, vocab))]


def walkable(config: VLMConfig) -> list[str]:
    """The kinds of media whose way can be shown: pictures and clips, in models that splice."""
    if not isinstance(config.model, Splice.Config):
        return []
    return [kind for kind in ("image", "video") if kind in config.processing.media and kind in config.model.media]


def count_tokens(config: VLMConfig, kind: str, picture: tuple[int, int], of: int = 1) -> int:
    """Tokens of one of ``of`` pictures of (width, height), or of a clip of such frames."""
    return config.count(kind, layout_of(config, kind, picture, of))


def layout_of(config: VLMConfig, kind: str, picture: tuple[int, int], of: int = 1) -> Layout:
    """How a picture of (width, height), or a clip of such frames, is cut into units. Raises ConfigError."""
    if kind not in config.processing.media:
        raise ConfigError(f"this model takes no {kind}; it takes {', '.join(config.processing.media)}")
    settings = config.processing.media[kind]
    front_end = registry.get("front_end", settings.type)(settings)
    blank = Pillow.new("L", picture)
    medium: Media = Video([blank] * FRAMES, fps=30.0) if kind == "video" else Image(blank)
    place = Place("example", 0, of)
    return front_end.layout(medium, place) if hasattr(front_end, "layout") else front_end(medium, place).layout


def options(config: Config) -> str:
    """The options of a part that differ from its type's defaults: ``dim 1024, depth 24, …``."""
    found = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "type" or value == field.default or isinstance(value, (dict, tuple, list)):
            continue
        if isinstance(value, Config):
            value = "(" + ", ".join(f"{k} {v}" for k, v in value.model_dump(exclude_defaults=True).items()) + ")"
        found.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(found)


def arithmetic(config: VLMConfig, kind: str, layout: Layout) -> str:
    """How the tokens of a medium come about: ``729 + 40 x (54 + 1)``."""
    stream, unit = config.model.stream(kind), config.model.unit_count(kind, layout.shape)
    layout = config.model.joined(kind, layout)
    merge = stream.merge
    if isinstance(merge, SpatialUnpad.Config) and layout.grid != (0, 0):
        rows, columns = merge.shrunk(merge.kept(layout, unit), unit)
        return f"{unit.tokens} + {rows} x ({columns} + 1)" if merge.base else f"{rows} x ({columns} + 1)"
    vectors = getattr(config.model, "vectors", config.model.count)(kind, layout)
    total, extra = layout.units * unit.tokens, vectors - layout.units * unit.tokens
    words = f"{layout.units} x {unit.tokens}" if layout.units > 1 else f"{total}"
    return f"{words} + {extra}" if extra else words


def _row(place: str, config: Any, parameters: int, widths: str = "") -> PartRow:
    return PartRow(
        place,
        getattr(config, "type", "gated blocks"),
        ", ".join(words for words in (widths, options(config)) if words),
        parameters,
    )


def _order(places: set[str]) -> list[str]:
    """Encoders before connectors, each by name."""
    return sorted(places, key=lambda place: (place.startswith("connectors."), place))


def _widths(model: Fusion, place: str) -> str:
    """The widths a connector joins: ``1024 to 4096``."""
    kind, _, name = place.partition(".")
    if kind != "connectors":
        return ""
    if isinstance(model, Classifier):
        return f"{model.encoders[name].dim} to {model.config.classes}"
    if isinstance(model, DualTower):
        return f"{model.encoders[name].dim} to {model.config.dim}"
    feeding = next(s.encoders for s in model.config.media.values() if s.connector == name)  # type: ignore[attr-defined]
    widths = (str(model.encoders[encoder].dim) for encoder in feeding)  # type: ignore[index, union-attr]
    return f"{' and '.join(widths)} to {getattr(model, 'width', model.lm.dim)}"  # type: ignore[union-attr]


def _places(model: Any) -> str:
    """Where gated blocks stand: ``before layers 3, 7, …``."""
    places = [str(place) for place in model.places]
    listed = ", ".join(places if len(places) < 6 else [*places[:3], "…", places[-1]])
    return f"{len(places)} before layers {listed}"


def _at(config: Any, place: str) -> Any:
    kind, _, name = place.partition(".")
    return getattr(config, kind)[name]


def _unit_words(config: VLMConfig, kind: str, layout: Layout) -> str:
    """What the front end made of the medium, in words."""
    settings = config.processing.media[kind]
    if kind == "video":
        return f"{layout.units} frames of {FRAMES}, {_fit_words(settings.image)}"
    if layout.grid == (0, 0):
        return _fit_words(settings) if hasattr(settings, "fit") else settings.type
    rows, columns = layout.grid
    return f"whole picture stretched, and {columns} x {rows} tiles of it"


def _pooled(pool: Pool, tokens: Tokens) -> Step:
    units, count, width = tokens.x.shape
    return Step(f"{pool.mode} pooling by {pool.stride}", (units, pool.count(Count(count, tokens.grid)).tokens, width))


def _fit_words(image: Any) -> str:
    return {
        "crop": "shorter side resized, centre cut out",
        "pad": "padded to a square, resized",
        "squash": "stretched to a square",
    }[image.fit]
