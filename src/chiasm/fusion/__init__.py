"""The ways of joining media to language, one file each."""

from chiasm.fusion import cross_attention, dual_tower, merge, multiway, query_text, single_stream, splice

__all__ = ["cross_attention", "dual_tower", "merge", "multiway", "query_text", "single_stream", "splice"]
