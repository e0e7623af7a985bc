"""MiniGPT-4's released file read into a model: one linear layer, all that was trained.

    vlm.load_part("minigpt4", "pretrained_minigpt4.pth", allow_pickle=True)

Reference: Vision-CAIR/MiniGPT-4 d94738a: under ``model``, the file holds ``llama_proj.weight`` and
``llama_proj.bias``. It is a pickle, so reading it must be permitted. Video-LLaMA starts its layer from the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from chiasm.convert.engine import load_weights
from chiasm.convert.io import open_weights
from chiasm.convert.rules import Plan, rename
from chiasm.errors import CheckpointError

NAME = "minigpt4"
LAYER = "connectors.image.proj."


def load(model: Any, path: Path, allow_pickle: bool = False) -> Plan:
    """Fill ``connectors.image.proj``; gives the plan. Raises CheckpointError where a tensor is missing or left over."""
    connectors = getattr(model, "connectors", {})
    layer = getattr(connectors["image"], "proj", None) if "image" in connectors else None
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(
            f"{path}: a MiniGPT-4 file fills the linear layer connectors.image.proj, which this model does not have; "
            "build one of the presets minigpt-4-vicuna-7b, minigpt-4-vicuna-13b, minigpt-4-llama-2-7b or video-llama-7b"
        )
    weights = open_weights(path, allow_pickle)
    return load_weights(model, weights, [rename("llama_proj.{leaf}", LAYER + "{leaf}")], part=LAYER)
