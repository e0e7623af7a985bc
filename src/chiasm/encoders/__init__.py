"""Encoders: units of a medium in, feature vectors out."""

from chiasm.encoders import hf, text, vit

__all__ = ["hf", "text", "vit"]
