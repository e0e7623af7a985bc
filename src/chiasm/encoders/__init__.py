"""Encoders: units of a medium in, feature vectors out."""

from chiasm.encoders import vit

__all__ = ["vit"]
