"""Connectors: from the encoders' widths to the language model's."""

from chiasm.connectors import (
    dynamic,
    gate,
    hierarchical,
    linear,
    map_head,
    mlp,
    mqt,
    pixel_shuffle,
    pooled,
    qformer,
    resampler,
)

__all__ = [
    "dynamic",
    "gate",
    "hierarchical",
    "linear",
    "map_head",
    "mlp",
    "mqt",
    "pixel_shuffle",
    "pooled",
    "qformer",
    "resampler",
]
