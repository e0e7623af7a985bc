"""Language models."""

from chiasm.lm import decoder

__all__ = ["decoder"]
