"""Connectors: from the encoders' widths to the language model's."""

from chiasm.connectors import dynamic, gate, hierarchical, linear, mlp, mqt, pixel_shuffle, qformer, resampler

__all__ = [
    "dynamic",
    "gate",
    "hierarchical",
    "linear",
    "mlp",
    "mqt",
    "pixel_shuffle",
    "qformer",
    "resampler",
]
