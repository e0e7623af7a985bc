"""Connectors: from the encoders' widths to the language model's."""

from chiasm.connectors import linear, mlp, pixel_shuffle, qformer

__all__ = ["linear", "mlp", "pixel_shuffle", "qformer"]
