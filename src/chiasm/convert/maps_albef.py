"""Names of the authors' checkpoints of ALBEF ↔ names of ``albef``.

Source: ``model_pretrain.py``, ``model_vqa.py``, ``model_nlvr.py`` and ``xbert.py`` of salesforce/ALBEF b9727e4. The
tensors stand under ``model`` of the file. A pre-training checkpoint has everything twice, the copies with ``_m``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import AnyRule, Drop, Rule, Tied, prefixed, rename, split, squeeze, transpose

_LAYER = {
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.out",
    "attention.output.LayerNorm": "norm1",
    "crossattention.self.query": "cross.q",
    "crossattention.self.key": "cross.k",
    "crossattention.self.value": "cross.v",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}


def timm_vit(dim: int) -> list[AnyRule]:
    """timm's ``VisionTransformer`` of width ``dim`` without a head ↔ ``vit``."""
    theirs, ours = "blocks.{i}.", "blocks.{i}."
    names = {"attn.proj": "attn.out", "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    fused = [
        split(theirs + "attn.qkv." + leaf, [ours + f"attn.{x}." + leaf for x in "qkv"], [dim] * 3)
        for leaf in ("weight", "bias")
    ]
    return [
        squeeze("cls_token", "cls", leading=2),
        squeeze("pos_embed", "positions"),
        rename("patch_embed.proj.{leaf}", "patch.{leaf}"),
        *fused,
        *(rename(theirs + a + ".{leaf}", ours + b + ".{leaf}") for a, b in names.items()),
        rename("norm.{leaf}", "post_norm.{leaf}"),
    ]


def _embeddings(prefix: str, ours: str) -> list[AnyRule]:
    return [
        rename(prefix + "word_embeddings.weight", ours + "words.weight"),
        rename(prefix + "position_embeddings.weight", ours + "positions.weight"),
        rename(prefix + "token_type_embeddings.weight", ours + "kinds.weight"),
        rename(prefix + "LayerNorm.{leaf}", ours + "norm.{leaf}"),
        Drop(prefix + "position_ids", COMPUTED),
    ]


def _layers(theirs: str, ours: str, count: int, first: int = 0) -> list[AnyRule]:
    return [
        rename(f"{theirs}encoder.layer.{first + i}.{a}.{{leaf}}", f"{ours}{i}.{b}.{{leaf}}")
        for i in range(count)
        for a, b in _LAYER.items()
    ]


def _predictions(prefix: str, table: str, ours: str) -> list[AnyRule]:
    return [
        rename(prefix + "transform.dense.{leaf}", ours + "dense.{leaf}"),
        rename(prefix + "transform.LayerNorm.{leaf}", ours + "norm.{leaf}"),
        rename(prefix + "bias", ours + "bias"),
        Tied(prefix + "decoder.bias", prefix + "bias"),
        Tied(prefix + "decoder.weight", table),
    ]


def _body(dim: int, text_depth: int, fusion_depth: int, mark: str) -> list[AnyRule]:
    """``mark`` is ``_m`` for the copies. The text model stands below ``bert.`` where it has a head for words."""
    rules: list[AnyRule] = [*prefixed(timm_vit(dim), f"visual_encoder{mark}.", "vision.")]
    for bert in (f"text_encoder{mark}.bert.", f"text_encoder{mark}."):
        rules += _embeddings(bert + "embeddings.", "words.")
        rules += _layers(bert, "text.", text_depth)
        rules += _layers(bert, "fusion.", fusion_depth, first=text_depth)
    predictions = f"text_encoder{mark}.cls.predictions."
    table = f"text_encoder{mark}.bert.embeddings.word_embeddings.weight"
    return [
        *rules,
        *_predictions(predictions, table, "word_scores."),
        rename(f"vision_proj{mark}.{{leaf}}", "image_proj.{leaf}"),
        rename(f"text_proj{mark}.{{leaf}}", "text_proj.{leaf}"),
    ]


def _decoder(depth: int, mark: str = "", ours: str = "decoder.") -> list[AnyRule]:
    bert = f"text_decoder{mark}.bert."
    head = f"text_decoder{mark}.cls.predictions."
    return [
        *_embeddings(bert + "embeddings.", ours + "words."),
        *_layers(bert, ours + "blocks.", depth),
        *_predictions(head, bert + "embeddings.word_embeddings.weight", ours + "word_scores."),
    ]


def _number() -> Rule:
    """Their scalars have shape [] or [1]."""

    def one(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].reshape(())]

    return Rule(("temp",), ("temperature",), one, lambda parts: list(parts))


def albef(
    dim: int, text_depth: int = 6, fusion_depth: int = 6, answer_depth: int = 6, copies: bool = True
) -> list[AnyRule]:
    """A checkpoint whose tower is of width ``dim``; ``fusion_depth`` counts the layers that stand (NLVR2: 12).

    ``copies`` false leaves the momentum copies out, for a model that is fine-tuned without them.
    """
    sizes = (dim, text_depth, fusion_depth)
    why = "a momentum copy, for a model that has none"
    names = ("visual_encoder_m", "text_encoder_m", "text_decoder_m", "vision_proj_m", "text_proj_m", "cls_head_m")
    queues = ("image_queue", "text_queue", "queue_ptr")
    copied: list[AnyRule] = [Drop(f"{name}.{{rest}}", why) for name in names]
    queued: list[AnyRule] = [Drop(name, why) for name in queues]
    if copies:
        answers = _decoder(answer_depth, "_m", "decoder_follower.")
        copied = [*prefixed(_body(*sizes, "_m"), "", "follower."), *answers, *copied[5:]]
        queued = [
            transpose("image_queue", "image_queue"),
            transpose("text_queue", "text_queue"),
            rename("queue_ptr", "queue_place"),
            Drop("idx_queue", "keys of pictures as their place in the authors' list"),
        ]
    return [
        *prefixed(_body(*sizes, ""), "", "body."),
        *copied,
        *queued,
        *_decoder(answer_depth),
        rename("itm_head.{leaf}", "match_scores.{leaf}"),
        rename("cls_head.{i}.{leaf}", "classifier.{i}.{leaf}"),
        _number(),
    ]
