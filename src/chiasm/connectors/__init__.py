"""Connectors: from the encoders' widths to the language model's."""

from chiasm.connectors import linear, mlp

__all__ = ["linear", "mlp"]
