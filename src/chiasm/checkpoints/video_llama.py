"""Video-LLaMA from files: BLIP-2's Q-Former for its frames, and its own released files, one for each branch.

    weights: {connectors.image.frame: blip2_pretrained_flant5xxl.safetensors}          # where its training begins
    vlm.load_part("video_llama", "finetune-vicuna7b.pth", allow_pickle=True)           # what it released, both files

Reference: DAMO-NLP-SG/Video-LLaMA 2143b4d ``video_llama.py``. Its file holds, under ``model``, the frame positions, the
second level (``video_Qformer``, ``video_query_tokens``) and ``llama_proj``; the first level is the Q-Former of BLIP-2's
Flan-T5-XXL, in LAVIS's names. The file of the audio branch holds ``audio_Qformer``, ``audio_query_tokens``,
``audio_position_embedding`` and ``audio_llama_proj``; ImageBind stands in a file of its own (``encoders.audio``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from chiasm.connectors.hierarchical import Hierarchical
from chiasm.convert import maps_blip
from chiasm.convert.engine import load_weights
from chiasm.convert.io import open_weights
from chiasm.convert.rules import AnyRule, Drop, Plan, Rule, rename
from chiasm.errors import CheckpointError

NAME, FRAME = "video_llama", ".frame"
HERE, HEARS = "connectors.image.", "connectors.audio."
LEVELS = {  # a query transformer of LAVIS, called X, ↔ a level
    "frame": {"X.queries": HERE + "frame_queries", "X.body.": HERE + "frame."},
    "clip": {"X.queries": HERE + "queries", "X.body.": HERE + "clip."},
    "audio": {"X.queries": HEARS + "queries", "X.body.": HEARS + "body."},
}
ELSEWHERE = "belongs to a part that this model does not have, or that is read from its own folder"


def of_level(level: str, theirs: str = "", queries: str = "query_tokens") -> list[AnyRule]:
    """The rules of one level, whose names in the file are LAVIS's with ``theirs`` before them (``video_Qformer``)."""
    found: list[AnyRule] = []
    for rule in maps_blip.lavis_qformer("X", False):
        if isinstance(rule, Drop):
            found.append(Drop(theirs + rule.theirs, rule.why))
            continue
        assert isinstance(rule, Rule)
        own = tuple(_placed(name, LEVELS[level]) for name in rule.ours)
        source = tuple(queries if name == "query_tokens" else theirs + name for name in rule.theirs)
        found.append(replace(rule, theirs=source, ours=own))
    return found


def load_frame(model: Any, path: Path, allow_pickle: bool = False) -> Plan:
    """Fill the first level from a file of BLIP-2 in LAVIS's names. Raises CheckpointError."""
    _checked(model, path)
    rules = [*of_level("frame"), *maps_blip.lavis_heads(False)]
    return load_weights(
        model, open_weights(path, allow_pickle), rules, part=tuple(LEVELS["frame"].values()), others=True
    )


def load(model: Any, path: Path, allow_pickle: bool = False) -> Plan:
    """Fill what Video-LLaMA trains: the branch, or both, of which the file holds something, and the first level where
    it holds that. Raises CheckpointError.
    """
    _checked(model, path)
    weights = open_weights(path, allow_pickle)
    hears = "audio" in model.connectors and any(name.startswith("audio_") for name in weights.info)
    part = [*LEVELS["audio"].values(), HEARS + "positions", HEARS + "proj."] if hears else []
    if not hears or any(name.startswith(("video_", "llama_proj.")) for name in weights.info):
        part += [*LEVELS["clip"].values(), HERE + "positions", HERE + "proj."]
    rules = [
        *of_level("clip", "video_", "video_query_tokens"),
        rename("video_frame_position_embedding.weight", HERE + "positions"),
        rename("llama_proj.{leaf}", HERE + "proj.{leaf}"),
        *of_level("frame"),
        *maps_blip.lavis_heads(False),
        *_heads("video_"),
        *(Drop(name + ".{rest}", ELSEWHERE) for name in ("llama_model", "visual_encoder", "ln_vision")),
        *(_sound() if hears else [Drop("audio_{rest}", ELSEWHERE)]),
        Drop("llama_proj_{rest}", ELSEWHERE),
    ]
    if "query_tokens" in weights.info:
        part += LEVELS["frame"].values()
    return load_weights(model, weights, rules, part=tuple(part))


def _sound() -> list[AnyRule]:
    """The rules of the audio branch, ImageBind left out."""
    return [
        *of_level("audio", "audio_", "audio_query_tokens"),
        rename("audio_position_embedding.weight", HEARS + "positions"),
        rename("audio_llama_proj.{leaf}", HEARS + "proj.{leaf}"),
        *_heads("audio_"),
        Drop("audio_encoder.{rest}", ELSEWHERE),
    ]


def _heads(theirs: str) -> list[AnyRule]:
    return [Drop(f"{theirs}Qformer.{head}." + "{rest}", ELSEWHERE) for head in ("cls", "bert.pooler")]


def _placed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def _checked(model: Any, path: Path) -> None:
    connectors = getattr(model, "connectors", {})
    if "image" not in connectors or not isinstance(connectors["image"], Hierarchical):
        raise CheckpointError(
            f"{path}: a Video-LLaMA file fills a connector 'image' of type 'hierarchical', which this model does not "
            "have; build video-llama-7b or video-llama-13b"
        )
