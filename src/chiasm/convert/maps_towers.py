"""Names of published two-tower models ↔ names of ``dual_tower``: transformers, OpenAI, open_clip.

Each function gives the rules of a whole model. Sources: transformers 5.23 (``CLIPModel``, ``SiglipModel``), openai/CLIP
``model.py`` d05afc4, open_clip ``transformer.py`` 89fb801.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiasm.convert import maps
from chiasm.convert.rules import AnyRule, Drop, Rule, prefixed, rename, squeeze, transpose

IMAGE, TEXT = "encoders.image.", "encoders.text."


def thirds(theirs: str, ours: Sequence[str]) -> Rule:
    """One tensor that is three of ours of equal size, one above the other (queries, keys, values)."""

    def into_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].shape[0] % 3:
            raise RuntimeError(f"{tensors[0].shape[0]} rows are not three times as many")
        return tensors[0].chunk(3)

    return Rule((theirs,), tuple(ours), into_ours, lambda parts: [torch.cat(list(parts))])


def attention_in(theirs: str, ours: str) -> Rule:
    """``nn.MultiheadAttention``'s one matrix for queries, keys and values ↔ ours."""
    return thirds(theirs + "in_proj_{leaf}", [ours + x + ".{leaf}" for x in "qkv"])


def clip_hf() -> list[AnyRule]:
    """``CLIPModel`` ↔ ``dual_tower``."""
    return [
        *text_hf(),
        rename("visual_projection.weight", "connectors.image.proj.weight"),
        rename("text_projection.weight", "connectors.text.proj.weight"),
        rename("logit_scale", "logit_scale"),
        *prefixed(maps.clip_vit(), "", IMAGE),
    ]


def siglip_hf() -> list[AnyRule]:
    """``SiglipModel`` and ``Siglip2Model`` ↔ ``dual_tower``. Their scale and bias have shape [1]."""
    head, pool = "vision_model.head.", "connectors.image."
    return [
        *text_hf(),
        squeeze(head + "probe", pool + "probe", leading=2),
        attention_in(head + "attention.", pool + "attn."),
        rename(head + "attention.out_proj.{leaf}", pool + "attn.out.{leaf}"),
        rename(head + "layernorm.{leaf}", pool + "norm.{leaf}"),
        rename(head + "mlp.fc1.{leaf}", pool + "mlp.fc1.{leaf}"),
        rename(head + "mlp.fc2.{leaf}", pool + "mlp.fc2.{leaf}"),
        rename("text_model.head.{leaf}", "connectors.text.proj.{leaf}"),
        squeeze("logit_scale", "logit_scale"),
        squeeze("logit_bias", "logit_bias"),
        *prefixed(maps.siglip_vit(), "", IMAGE),
    ]


def clip_openai() -> list[AnyRule]:
    """The state dict of OpenAI's ``CLIP`` with a ViT, and open_clip's of the same names, ↔ ``dual_tower``."""
    return [
        *clip_openai_text(),
        *clip_openai_vit("visual.", IMAGE),
        rename("visual.ln_post.{leaf}", IMAGE + "post_norm.{leaf}"),
        transpose("visual.proj", "connectors.image.proj.weight"),
    ]


def clip_openai_vit(theirs: str, ours: str) -> list[AnyRule]:
    """OpenAI's ViT up to its last block, as LAVIS has it too."""
    return [
        rename(theirs + "conv1.weight", ours + "patch.weight"),
        rename(theirs + "class_embedding", ours + "cls"),
        rename(theirs + "positional_embedding", ours + "positions"),
        rename(theirs + "ln_pre.{leaf}", ours + "pre_norm.{leaf}"),
        *_resblocks(theirs + "transformer.", ours),
    ]


def clip_openai_text() -> list[AnyRule]:
    """The text tower and the scale of the same."""
    return [
        *_resblocks("transformer.", TEXT),
        rename("token_embedding.weight", TEXT + "embedding.weight"),
        rename("positional_embedding", TEXT + "positions"),
        rename("ln_final.{leaf}", TEXT + "norm.{leaf}"),
        transpose("text_projection", "connectors.text.proj.weight"),
        rename("logit_scale", "logit_scale"),
        rename("logit_bias", "logit_bias"),
        *(Drop(name, maps.COMPUTED) for name in ("input_resolution", "context_length", "vocab_size", "attn_mask")),
    ]


def _resblocks(theirs: str, ours: str) -> list[AnyRule]:
    layer, block = theirs + "resblocks.{i}.", ours + "blocks.{i}."
    names = {
        "attn.out_proj": "attn.out",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    return [
        attention_in(layer + "attn.", block + "attn."),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
    ]


def text_hf() -> list[AnyRule]:
    """The text towers of ``CLIPModel``, ``CLIPTextModel`` and ``SiglipModel``."""
    layer, block = "text_model.encoder.layers.{i}.", TEXT + "blocks.{i}."
    names = {
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.out",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return [
        rename("text_model.embeddings.token_embedding.weight", TEXT + "embedding.weight"),
        rename("text_model.embeddings.position_embedding.weight", TEXT + "positions"),
        Drop("text_model.embeddings.position_ids", maps.COMPUTED),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("text_model.final_layer_norm.{leaf}", TEXT + "norm.{leaf}"),
    ]


# ------------------------------------------------------------------------------------------- residual networks, ALIGN


def clip_openai_resnet() -> list[AnyRule]:
    """The state dict of OpenAI's ``CLIP`` with a residual network ↔ ``dual_tower``."""
    layer, pool = "visual.layer", "visual.attnpool."
    rules: list[AnyRule] = [*clip_openai_text()]
    for n in (1, 2, 3):
        rules.append(rename(f"visual.conv{n}.weight", IMAGE + f"conv{n}.weight"))
        rules.append(rename(f"visual.bn{n}." + "{leaf}", IMAGE + f"norm{n}." + "{leaf}"))
    for n in range(4):
        theirs, ours = f"{layer}{n + 1}." + "{i}.", IMAGE + f"stages.{n}." + "{i}."
        for k in (1, 2, 3):
            rules.append(rename(theirs + f"conv{k}.weight", ours + f"conv{k}.weight"))
            rules.append(rename(theirs + f"bn{k}." + "{leaf}", ours + f"norm{k}." + "{leaf}"))
        rules.append(rename(theirs + "downsample.0.weight", ours + "short_conv.weight"))
        rules.append(rename(theirs + "downsample.1.{leaf}", ours + "short_norm.{leaf}"))
    rules.append(rename(pool + "positional_embedding", "connectors.image.positions"))
    for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("c_proj", "out")):
        rules.append(rename(pool + theirs + ".{leaf}", f"connectors.image.{ours}." + "{leaf}"))
    return rules


def bert_hf() -> list[AnyRule]:
    """``BertModel`` (and ``AlignTextModel``) ↔ ``bert``, without a prefix."""
    layer, block = "encoder.layer.{i}.", "blocks.{i}."
    names = {
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.output.dense": "attn.out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "output.LayerNorm": "norm2",
    }
    return [
        rename("embeddings.word_embeddings.weight", "embedding.words.weight"),
        rename("embeddings.position_embeddings.weight", "embedding.positions.weight"),
        rename("embeddings.token_type_embeddings.weight", "embedding.kinds.weight"),
        rename("embeddings.LayerNorm.{leaf}", "embedding.norm.{leaf}"),
        *(Drop("embeddings." + name, maps.COMPUTED) for name in ("position_ids", "token_type_ids")),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("pooler.dense.{leaf}", "pooler.{leaf}"),
    ]


def align_hf() -> list[AnyRule]:
    """``AlignModel`` ↔ ``dual_tower``."""
    theirs, ours = "vision_model.encoder.blocks.{i}.", IMAGE + "blocks.{i}."
    names = {
        "expansion.expand_conv": "expand",
        "expansion.expand_bn": "expand_norm",
        "depthwise_conv.depthwise_conv": "depthwise",
        "depthwise_conv.depthwise_norm": "depthwise_norm",
        "squeeze_excite.reduce": "reduce",
        "squeeze_excite.expand": "excite",
        "projection.project_conv": "project",
        "projection.project_bn": "project_norm",
    }
    return [
        *prefixed(bert_hf(), "text_model.", TEXT),
        rename("text_projection.{leaf}", "connectors.text.proj.{leaf}"),
        rename("temperature", "temperature"),
        rename("vision_model.embeddings.convolution.weight", IMAGE + "stem.weight"),
        rename("vision_model.embeddings.batchnorm.{leaf}", IMAGE + "stem_norm.{leaf}"),
        *(rename(theirs + a + ".{leaf}", ours + b + ".{leaf}") for a, b in names.items()),
    ]
