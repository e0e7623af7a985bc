"""The ways of joining media to language, one file each."""

from chiasm.fusion import merge, splice

__all__ = ["merge", "splice"]
