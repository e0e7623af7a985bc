"""OpenFlamingo's released file read into a model: resampler, gated blocks and input embeddings, all that was trained.

    vlm.load_part("lm", "mpt-7b").load_part("encoders.image", "clip-vit-large-patch14")
    vlm.load_part("openflamingo", "checkpoint.pt", allow_pickle=True)

Reference: ``train_utils.py`` of mlfoundations/open_flamingo 655f693. The file is read last: its embeddings are those of
the language model's with the rows of the added tokens. It is a pickle, so reading it must be permitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.connectors.resampler import Resampler
from chiasm.convert.engine import load_weights
from chiasm.convert.io import open_weights
from chiasm.convert.maps_flamingo import openflamingo
from chiasm.convert.rules import Plan
from chiasm.errors import CheckpointError
from chiasm.fusion.cross_attention import CrossAttention

NAME = "openflamingo"
PARTS = ("connectors.image.", "cross.", "lm.embedding.")


def load(model: Any, path: Path, allow_pickle: bool = False) -> Plan:
    """Fill what OpenFlamingo trains; gives the plan. Raises CheckpointError where a tensor is missing or left over."""
    connector = model.config.connectors.get("image") if isinstance(model, CrossAttention) else None
    if not isinstance(connector, Resampler.Config):
        raise CheckpointError(
            f"{path}: an OpenFlamingo file fills a fusion 'cross_attention' whose connector 'image' is a 'resampler'; "
            "build one of the presets openflamingo-3b, -4b or -9b"
        )
    blocks = model.config.blocks
    width = blocks.heads * (blocks.head_dim or model.lm.dim // blocks.heads)
    rules = openflamingo(model.places, connector.heads * connector.head_dim, width)
    return load_weights(model, open_weights(path, allow_pickle), rules, part=PARTS)
