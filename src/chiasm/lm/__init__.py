"""Language models."""

from chiasm.lm import decoder, hf

__all__ = ["decoder", "hf"]
