"""Component maps of ViLT: names of transformers' and of the authors' files ↔ names of ``single_stream``.

Sources: ``modeling_vilt.py`` of transformers 5.23; ``vilt_module.py`` of dandelin/ViLT 762fd39. Rules name every tensor
that any class of ViLT has; what a file lacks, the model must not have.
"""

from __future__ import annotations

from collections.abc import Collection

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import Alias, AnyRule, Drop, Tied, prefixed, rename, split, squeeze

_TEXT = {
    "word_embeddings.weight": "text.words.weight",
    "position_embeddings.weight": "text.positions.weight",
    "token_type_embeddings.weight": "text.kinds.weight",
}


def _text(prefix: str) -> list[AnyRule]:
    return [
        *(rename(prefix + theirs, ours) for theirs, ours in _TEXT.items()),
        rename(prefix + "LayerNorm.{leaf}", "text.norm.{leaf}"),
        Drop(prefix + "position_ids", COMPUTED),
        Drop(prefix + "token_type_ids", COMPUTED),
    ]


def _words() -> list[AnyRule]:
    return [
        rename("mlm_score.transform.dense.{leaf}", "word_scores.dense.{leaf}"),
        rename("mlm_score.transform.LayerNorm.{leaf}", "word_scores.norm.{leaf}"),
        rename("mlm_score.decoder.weight", "word_scores.decoder.weight"),
        rename("mlm_score.decoder.bias", "word_scores.decoder.bias"),
    ]


def word_bias(names: Collection[str]) -> list[AnyRule]:
    """How a file spells the bias of the word head: by itself, by the decoder, or both, which must then be equal."""
    if {"mlm_score.bias", "mlm_score.decoder.bias"} <= set(names):
        return [Tied("mlm_score.bias", "mlm_score.decoder.bias")]
    return [Alias("mlm_score.bias", "mlm_score.decoder.bias")]


def hf_body() -> list[AnyRule]:
    """``ViltModel``, without the prefix that its classes with heads have."""
    layer, block = "encoder.layer.{i}.", "blocks.{i}."
    names = {
        "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k",
        "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.out",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    return [
        *_text("embeddings.text_embeddings."),
        squeeze("embeddings.cls_token", "cls", leading=2),
        squeeze("embeddings.position_embeddings", "positions"),
        rename("embeddings.patch_embeddings.projection.{leaf}", "patch.{leaf}"),
        rename("embeddings.token_type_embeddings.weight", "kinds.weight"),
        *(rename(layer + theirs + ".{leaf}", block + ours + ".{leaf}") for theirs, ours in names.items()),
        rename("layernorm.{leaf}", "norm.{leaf}"),
        rename("pooler.dense.{leaf}", "pooler.dense.{leaf}"),
    ]


def hf(prefix: str = "vilt.") -> list[AnyRule]:
    """Any class of transformers; ``prefix`` is empty for ``ViltModel`` alone."""
    return [
        *prefixed(hf_body(), prefix),
        *_words(),
        rename("classifier.{i}.{leaf}", "classifier.{i}.{leaf}"),
        rename("rank_output.{leaf}", "rank_score.{leaf}"),
    ]


def original(dim: int, classifier: str = "vqa_classifier") -> list[AnyRule]:
    """The authors' checkpoint, of width ``dim``; ``classifier`` is which of their heads is read (also NLVR2's)."""
    theirs, ours = "transformer.blocks.{i}.", "blocks.{i}."
    names = {"attn.proj": "attn.out", "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    fused = [
        split(theirs + "attn.qkv." + leaf, [ours + f"attn.{x}." + leaf for x in "qkv"], [dim] * 3)
        for leaf in ("weight", "bias")
    ]
    return [
        *_text("text_embeddings."),
        squeeze("transformer.cls_token", "cls", leading=2),
        squeeze("transformer.pos_embed", "positions"),
        rename("transformer.patch_embed.proj.{leaf}", "patch.{leaf}"),
        rename("token_type_embeddings.weight", "kinds.weight"),
        *fused,
        *(rename(theirs + a + ".{leaf}", ours + b + ".{leaf}") for a, b in names.items()),
        rename("transformer.norm.{leaf}", "norm.{leaf}"),
        rename("pooler.dense.{leaf}", "pooler.dense.{leaf}"),
        *_words(),
        rename("itm_score.fc.{leaf}", "match_scores.{leaf}"),
        rename("rank_output.{leaf}", "rank_score.{leaf}"),
        rename(classifier + ".{i}.{leaf}", "classifier.{i}.{leaf}"),
    ]
