"""Component maps of the BLIP-2 family: names of transformers' BLIP-2 and InstructBLIP ↔ names of our parts.

Sources: ``modeling_blip_2.py`` and ``modeling_instructblip.py`` of transformers 5.23. As in ``maps``, without the
prefix of a component's place in a model.
"""

from __future__ import annotations

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import AnyRule, Drop, rename, split, squeeze

_LAYER = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.out",
    "attention.output.LayerNorm": "attn_norm",
    "crossattention.attention.query": "cross.q",
    "crossattention.attention.key": "cross.k",
    "crossattention.attention.value": "cross.v",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate_query.dense": "query_mlp.fc1",
    "output_query.dense": "query_mlp.fc2",
    "output_query.LayerNorm": "query_norm",
    "intermediate.dense": "text_mlp.fc1",
    "output.dense": "text_mlp.fc2",
    "output.LayerNorm": "text_norm",
}


def _layers() -> list[AnyRule]:
    """The layers, with their text half or without."""
    layer, ours = "encoder.layer.{i}.", "body.layers.{i}."
    return [rename(layer + a + ".{leaf}", ours + b + ".{leaf}") for a, b in _LAYER.items()]


def qformer_blip2() -> list[AnyRule]:
    """``Blip2QFormerModel``: the norm stands by itself."""
    return [rename("layernorm.{leaf}", "body.norm.{leaf}"), *_layers()]


def qformer_instruct() -> list[AnyRule]:
    """``InstructBlipQFormerModel``: words, positions and norm in ``embeddings``."""
    return [
        rename("embeddings.layernorm.{leaf}", "body.norm.{leaf}"),
        *text_embeddings("embeddings."),
        *_layers(),
    ]


def text_embeddings(prefix: str) -> list[AnyRule]:
    """Words and positions: in InstructBLIP inside the Q-Former, in BLIP-2's retrieval model beside it."""
    return [
        rename(prefix + "word_embeddings.weight", "body.text.words.weight"),
        rename(prefix + "position_embeddings.weight", "body.text.positions.weight"),
        Drop(prefix + "position_ids", COMPUTED),
    ]


def eva_vit(dim: int) -> list[AnyRule]:
    """``Blip2VisionModel`` (EVA-CLIP) of width ``dim`` ↔ ``vit``: queries, keys and values are one matrix there."""
    layer, block = "encoder.layers.{i}.", "blocks.{i}."
    names = {
        "self_attn.projection": "attn.out",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    fused = [
        split(layer + "self_attn.qkv." + leaf, [block + f"attn.{x}." + leaf for x in "qkv"], [dim] * 3)
        for leaf in ("weight", "bias")
    ]
    return [
        squeeze("embeddings.class_embedding", "cls", leading=2),
        squeeze("embeddings.position_embedding", "positions"),
        rename("embeddings.patch_embedding.{leaf}", "patch.{leaf}"),
        *fused,
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("post_layernorm.{leaf}", "post_norm.{leaf}"),
    ]
