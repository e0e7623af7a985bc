"""Chiasm: compose a vision-language model from parts, train it, evaluate it, talk to it, serve it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "chiasm.vlm",
    "build": "chiasm.vlm",
    "VLM": "chiasm.vlm",
    "preset": "chiasm.presets",
    "presets": "chiasm.presets",
    "register": "chiasm.registry",
    "Message": "chiasm.types",
    "Text": "chiasm.types",
    "Image": "chiasm.types",
    "Video": "chiasm.types",
    "Audio": "chiasm.types",
    "Graph": "chiasm.types",
    "Series": "chiasm.types",
    "Box": "chiasm.types",
    "ChiasmError": "chiasm.errors",
}

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from chiasm.errors import ChiasmError as ChiasmError
    from chiasm.presets import preset as preset
    from chiasm.registry import register as register
    from chiasm.types import Audio as Audio
    from chiasm.types import Box as Box
    from chiasm.types import Graph as Graph
    from chiasm.types import Image as Image
    from chiasm.types import Message as Message
    from chiasm.types import Series as Series
    from chiasm.types import Text as Text
    from chiasm.types import Video as Video
    from chiasm.vlm import VLM as VLM
    from chiasm.vlm import build as build
    from chiasm.vlm import load as load


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'chiasm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
