"""Connectors: from the encoders' widths to the language model's."""

from chiasm.connectors import (
    clip_pool,
    dynamic,
    gate,
    hierarchical,
    linear,
    map_head,
    mlp,
    mqt,
    neighbours,
    pixel_shuffle,
    pooled,
    qformer,
    resampler,
)

__all__ = [
    "clip_pool",
    "dynamic",
    "gate",
    "hierarchical",
    "linear",
    "map_head",
    "mlp",
    "mqt",
    "neighbours",
    "pixel_shuffle",
    "pooled",
    "qformer",
    "resampler",
]
