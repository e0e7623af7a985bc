"""Language models."""

from chiasm.lm import decoder, gpt, hf

__all__ = ["decoder", "gpt", "hf"]
