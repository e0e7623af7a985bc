"""The tiny form of a model that reads words and pictures together: how it works is kept, sizes are made small."""

from __future__ import annotations

from typing import Any

from chiasm.model_config import VLMConfig

TYPES = ("single_stream", "albef", "modality_experts", "multiway")
LENGTH = 32  # tokens of a tiny text at most
SIDE, PATCH = 32, 8  # pixels
SIZES = {"dim": 32, "heads": 4, "mlp": 64}


def tiny_fused(config: VLMConfig, vocab: int) -> VLMConfig:
    """A fused model at tiny size, for a tokenizer of ``vocab`` tokens.

    A text is hidden by the tokenizer's own mask token where the preset names one that the tokenizer has; else set
    ``processing.masking.token``.
    """
    dump = config.dump()
    model, processing = dump["model"], dump["processing"]
    model.update(SIZES, text_vocab=vocab)
    kind = model["type"]
    if kind == "albef":
        model["vision"].update(dim=24, heads=4, mlp=48, depth=2, patch=PATCH, image_size=SIDE)
        model.update(text_depth=1, fusion_depth=2, text_positions=LENGTH)
        model.update(contrast=model["contrast"] and 16, answer_depth=model["answer_depth"] and 1)
        if model["momentum"]:
            model["momentum"]["queue"] = 64
    else:
        model.update(depth=3, patch=PATCH, image_size=SIDE)
        model["text_positions"] = LENGTH + 2  # BEiT-3 counts two that are unused
    if kind == "modality_experts":
        model.update(both_from=2, text_distance=LENGTH + 1)
    if kind == "single_stream" and model["sampled_patches"]:
        model["sampled_patches"] = 12
    if kind == "multiway" and model["codes"]:
        model["codes"] = 64
    if kind == "multiway" and model["picture_classes"]:
        model["picture_classes"] = 10
    if model["tasks"]["classes"]:
        model["tasks"]["classes"] = min(model["tasks"]["classes"], 10)
    front: dict[str, Any] = processing["media"]["image"]
    front.update({"shortest_edge": SIDE, "multiple": PATCH} if front["type"] == "proportional" else {"size": SIDE})
    processing["template"]["length"] = min(processing["template"]["length"], LENGTH)
    return VLMConfig.parse(dump)
