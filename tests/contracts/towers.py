"""A tiny model of two towers with a tokenizer, for tests of what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoint_kit import make_tokenizer

import chiasm
from chiasm.vlm import VLM

CONFIG: dict[str, Any] = {
    "model": {
        "type": "dual_tower",
        "dim": 12,
        "encoders": {
            "image": {
                "type": "vit", "image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "mlp": 24,
                "select": "cls",
            },
            "text": {"type": "text", "vocab": 300, "dim": 16, "depth": 2, "heads": 2, "mlp": 24, "positions": 32},
        },
        "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
    },
    "processing": {
        "template": {"type": "pair", "length": 32, "clean": "clip"},
        "media": {"image": {"type": "image", "size": 16}},
    },
}  # fmt: skip


def two_towers(folder: Path, seed: int = 0, **changes: Any) -> VLM:
    """Random weights, nothing zero, so that every word and pixel matters."""
    config = chiasm.model_config.VLMConfig.parse(CONFIG).edit(**changes)
    vlm = chiasm.build(config, tokenizer=make_tokenizer(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in vlm.named_parameters():
            if tensor.ndim:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
            assert name
    return vlm.eval()
