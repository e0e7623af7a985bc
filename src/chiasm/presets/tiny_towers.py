"""The tiny form of a model of two towers: options that say how it works are kept, sizes are made small."""

from __future__ import annotations

from typing import Any

from chiasm import registry
from chiasm.errors import ConfigError
from chiasm.model_config import VLMConfig

LENGTH = 32  # tokens of a tiny text at most
TEXT = {"dim": 32, "depth": 2, "heads": 4, "mlp": 64}
PICTURES: dict[str, dict[str, Any]] = {
    "vit": {"dim": 32, "depth": 2, "heads": 4, "mlp": 64, "patch": 8, "image_size": 32},
    "resnet": {"blocks": [1, 1, 1, 1], "width": 8, "image_size": 64},
    "efficientnet": {"width": 0.25, "depth": 0.6, "image_size": 49},
    "naflex": {"dim": 32, "depth": 2, "heads": 4, "mlp": 64, "patch": 8, "side": 4},
}


def tiny_classifier(config: VLMConfig) -> VLMConfig:
    """A model that classifies pictures at tiny size, with the classes it has labels for, else ten."""
    dump = config.dump()
    picture = dump["model"]["encoders"]["image"]
    picture.update(PICTURES[picture["type"]])
    dump["processing"]["media"]["image"]["size"] = picture["image_size"]
    dump["model"]["classes"] = len(dump["processing"]["labels"]) or 10
    return VLMConfig.parse(dump)


def tiny_towers(config: VLMConfig, vocab: int) -> VLMConfig:
    """A model of two towers at tiny size, for a tokenizer of ``vocab`` tokens. Raises ConfigError."""
    dump = config.dump()
    model, processing = dump["model"], dump["processing"]
    picture, text = model["encoders"]["image"], model["encoders"]["text"]
    if picture["type"] not in PICTURES or text["type"] not in ("text", "bert"):
        raise ConfigError(f"towers of types {picture['type']!r} and {text['type']!r} have no tiny form")
    picture.update(PICTURES[picture["type"]])
    length = min(text["positions"], LENGTH)
    text.update(TEXT, vocab=vocab, positions=length)
    pool = model["connectors"]["image"]
    if pool["type"] == "clip_pool":
        pool.update(grid=[2, 2], heads=4)
    elif pool["type"] == "map_head":
        pool.update(heads=4, mlp=64)
    kept = pool["type"] == "map_head" or pool.get("project") == "none"
    model["dim"] = registry.get("encoder", picture["type"]).Config.parse(picture).dim if kept else 24
    front = processing["media"]["image"]
    processing["template"]["length"] = min(processing["template"]["length"], length)
    if front["type"] == "naflex":
        front.update(patch=picture["patch"], patches=picture["side"] ** 2)
        return VLMConfig.parse(dump)
    size = picture["image_size"]
    if front.get("shortest_edge") is not None:
        front["shortest_edge"] = front["shortest_edge"] * size // front["size"]
    front["size"] = size
    return VLMConfig.parse(dump)
