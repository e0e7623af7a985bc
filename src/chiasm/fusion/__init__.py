"""The ways of joining media to language, one file each."""

from chiasm.fusion import (
    albef,
    classifier,
    cross_attention,
    dual_tower,
    merge,
    modality_experts,
    multiway,
    query_text,
    single_stream,
    splice,
    vokens,
)

__all__ = [
    "albef",
    "classifier",
    "cross_attention",
    "dual_tower",
    "merge",
    "modality_experts",
    "multiway",
    "query_text",
    "single_stream",
    "splice",
    "vokens",
]
