"""Encoders: units of a medium in, feature vectors out."""

from chiasm.encoders import hf, vit

__all__ = ["hf", "vit"]
