"""Component maps of the BLIP-2 family: names of transformers and of LAVIS ↔ names of our parts.

Sources: ``modeling_blip_2.py`` and ``modeling_instructblip.py`` of transformers 5.23; ``Qformer.py``,
``blip2_qformer.py`` and ``eva_vit.py`` of salesforce/LAVIS 506965b. As in ``maps``, without the prefix of a component's
place in a model, except for LAVIS, whose names are those of whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import AnyRule, Drop, Rule, Tied, rename, split, squeeze

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

BERT = {  # a layer of BertModel ↔ of a query transformer; its perceptron is text's
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.out",
    "attention.output.LayerNorm": "attn_norm",
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


# --------------------------------------------------------------------------------------------------------------- LAVIS

NO_TEXT = "belongs to the text half of the first stage, which this query transformer does not have"
FIRST_STAGE = "is a head of the first stage, which a model with a language model does not have"
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
HEADS = {
    "vision_proj.{leaf}": "image_proj.{leaf}",
    "text_proj.{leaf}": "text_proj.{leaf}",
    "itm_head.{leaf}": "matcher.{leaf}",
    "temp": "temperature",
    "Qformer.cls.predictions.transform.dense.{leaf}": "words.dense.{leaf}",
    "Qformer.cls.predictions.transform.LayerNorm.{leaf}": "words.norm.{leaf}",
    "Qformer.cls.predictions.bias": "words.bias",
}


def lavis_qformer(part: str, text: bool) -> list[AnyRule]:
    """LAVIS's queries and Q-Former ↔ the connector called ``part``, with its text half or without."""
    layer, ours = "Qformer.bert.encoder.layer.{i}.", part + ".body.layers.{i}."
    embeddings = "Qformer.bert.embeddings."
    rules: list[AnyRule] = [
        squeeze("query_tokens", part + ".queries"),
        rename(embeddings + "LayerNorm.{leaf}", part + ".body.norm.{leaf}"),
        Drop(embeddings + "position_ids", COMPUTED),
    ]
    for theirs, mine in _LAYER.items():
        name = layer + theirs.replace("ttention.attention.", "ttention.self.") + ".{leaf}"
        rules.append(
            rename(name, ours + mine + ".{leaf}") if text or not mine.startswith("text_") else Drop(name, NO_TEXT)
        )
    for kind in ("word", "position"):
        table = f"{embeddings}{kind}_embeddings.weight"
        rules.append(rename(table, f"{part}.body.text.{kind}s.weight") if text else Drop(table, NO_TEXT))
    return rules


def lavis_heads(kept: bool) -> list[AnyRule]:
    """The heads of the first stage; where not ``kept`` they are left out."""
    if not kept:
        return [*(Drop(theirs, FIRST_STAGE) for theirs in HEADS), Drop("Qformer.cls.{rest}", FIRST_STAGE)]
    return [
        *(rename(theirs, ours) for theirs, ours in HEADS.items()),
        Tied("Qformer.cls.predictions.decoder.weight", WORDS),
        Tied("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
    ]


def lavis_tower(part: str, dim: int) -> list[AnyRule]:
    """LAVIS's EVA-CLIP and the norm that it keeps beside it ↔ the ``vit`` called ``part``, of width ``dim``."""
    theirs, ours = "visual_encoder.", part + "."
    layer, block = theirs + "blocks.{i}.", ours + "blocks.{i}."
    names = {"attn.proj": "attn.out", **{n: n for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}}
    return [
        squeeze(theirs + "cls_token", ours + "cls", leading=2),
        squeeze(theirs + "pos_embed", ours + "positions"),
        rename(theirs + "patch_embed.proj.{leaf}", ours + "patch.{leaf}"),
        split(layer + "attn.qkv.weight", [block + f"attn.{x}.weight" for x in "qkv"], [dim] * 3),
        Rule((layer + "attn.q_bias",), (block + "attn.q.bias", block + "attn.k.bias"), _with_zeros, _first),
        rename(layer + "attn.v_bias", block + "attn.v.bias"),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("ln_vision.{leaf}", ours + "post_norm.{leaf}"),
    ]


def _with_zeros(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A bias of queries, and that of keys, which LAVIS does not have: 0."""
    return [tensors[0], torch.zeros_like(tensors[0])]


def _first(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The bias of queries. That of keys adds the same to every score of a query, so attention is the same without."""
    return [tensors[0]]
