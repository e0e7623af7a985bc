"""Published systems as configurations: a preset picks parts, and carries its paper, recipe and published size.

config = preset("llava-1.5-7b")                # at published size
config = preset("llava-1.5-7b", tiny=True)     # the same structure, small enough for a test
for record in presets(): print(record.name, record.parameters, record.paper)
"""

from __future__ import annotations

import sys
from types import ModuleType

from chiasm import registry
from chiasm.model_config import VLMConfig
from chiasm.presets import (
    blip2,
    blip2_clip,
    fused,
    hf_blip2,
    hf_idefics,
    hf_llava,
    hf_towers,
    hf_vilt,
    hf_vit,
    idefics,
    instructblip,
    lavis,
    llava,
    llava_next,
    llava_onevision,
    minigpt4,
    minigpt5,
    minigpt_v2,
    naflex,
    openflamingo,
    original_clip,
    original_llava,
    towers,
    video_llama,
    vit,
)
from chiasm.presets.record import Preset
from chiasm.presets.tiny import VOCAB
from chiasm.presets.tiny import tiny as shrink

__all__ = [
    "Preset",
    "blip2",
    "blip2_clip",
    "fused",
    "hf_blip2",
    "hf_idefics",
    "hf_llava",
    "hf_towers",
    "hf_vilt",
    "hf_vit",
    "idefics",
    "instructblip",
    "lavis",
    "llava",
    "llava_next",
    "llava_onevision",
    "minigpt4",
    "minigpt5",
    "minigpt_v2",
    "naflex",
    "openflamingo",
    "original_clip",
    "original_llava",
    "preset",
    "presets",
    "record_of",
    "towers",
    "video_llama",
    "vit",
]


def preset(name: str, tiny: bool = False, vocab: int = VOCAB) -> VLMConfig:
    """The configuration of a published system, at published size or as its tiny form for a vocabulary of ``vocab``.

    A tiny form keeps the template: where a small tokenizer lacks its control tokens, set ``processing.template`` to
    ``"simple"``. ``name`` may also be ``"package.module:function"``, a function that returns a ``VLMConfig``.

    Raises RegistryError, which says what names are near.
    """
    entry = registry.get("preset", name)
    config = entry.config() if isinstance(entry, Preset) else entry()
    return shrink(config, vocab) if tiny else config


def record_of(name: str) -> Preset:
    """What is known about a published system. Raises RegistryError."""
    return registry.get("preset", name)


def presets() -> list[Preset]:
    """All published systems, oldest first, then by size."""
    entries = (registry.get("preset", name) for name in registry.names("preset"))
    records = [entry for entry in entries if isinstance(entry, Preset)]
    return sorted(records, key=lambda r: (r.system.released, r.family, r.parameters))


class _Listed(ModuleType):
    """``chiasm.presets`` is this package, and called, it is its function: the two share their name."""

    def __call__(self) -> list[Preset]:
        """All published systems."""
        return presets()


sys.modules[__name__].__class__ = _Listed
