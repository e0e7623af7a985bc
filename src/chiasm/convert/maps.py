"""The shared component maps: names of published components ↔ names of our parts.

Each function gives the rules of one component, without the prefix of its place in a model (``rules.prefixed`` adds it).
Theirs are the names that transformers writes to disk; other spellings in use are aliases. Sources: transformers 5.23
``conversion_mapping.py`` and the model files named below; InternLM2 from its published ``modeling_internlm2.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiasm.convert.rules import Alias, AnyRule, Drop, Rule, Tied, rename, split, squeeze

NO_HEAD = "belongs to the pooling or projection head, which a vision-language model does not read"
COMPUTED = "is computed from the configuration"


# ---------------------------------------------------------------------------------------------------------- towers


def clip_vit() -> list[AnyRule]:
    """``CLIPVisionModel`` ↔ ``vit``; also the tower of a whole ``CLIPModel``."""
    return [
        *_vision_model_aliases("pre_layrnorm"),
        rename("vision_model.embeddings.class_embedding", "cls"),
        rename("vision_model.pre_layrnorm.{leaf}", "pre_norm.{leaf}"),
        *_contrastive_tower(),
    ]


def siglip_vit() -> list[AnyRule]:
    """``SiglipVisionModel`` ↔ ``vit`` (no class vector); its pooling head is dropped."""
    return [
        *_vision_model_aliases("head"),
        Drop("vision_model.head.{rest}", NO_HEAD),
        *_contrastive_tower(),
    ]


def vit() -> list[AnyRule]:
    """``ViTModel`` ↔ ``vit``; also below the classifier of ``ViTForImageClassification``."""
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
    renamed_in_v5 = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    return [
        Alias("vit.{rest}", "{rest}"),
        *(Alias("layers.{i}." + new + ".{leaf}", layer + old + ".{leaf}") for new, old in renamed_in_v5.items()),
        squeeze("embeddings.cls_token", "cls", leading=2),
        squeeze("embeddings.position_embeddings", "positions"),
        rename("embeddings.patch_embeddings.projection.{leaf}", "patch.{leaf}"),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("layernorm.{leaf}", "post_norm.{leaf}"),
        Drop("pooler.{rest}", NO_HEAD),
        Drop("classifier.{rest}", NO_HEAD),
    ]


def _vision_model_aliases(extra: str) -> list[AnyRule]:
    """Transformers 5 writes a tower that it built itself without ``vision_model.``."""
    parts = ("embeddings", "encoder", "post_layernorm", extra)
    return [Alias(part + ".{rest}", "vision_model." + part + ".{rest}") for part in parts]


def _contrastive_tower() -> list[AnyRule]:
    """What the towers of CLIP and SigLIP have in common."""
    layer, block = "vision_model.encoder.layers.{i}.", "blocks.{i}."
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
        rename("vision_model.embeddings.patch_embedding.{leaf}", "patch.{leaf}"),
        rename("vision_model.embeddings.position_embedding.weight", "positions"),
        *(rename(layer + a + ".{leaf}", block + b + ".{leaf}") for a, b in names.items()),
        rename("vision_model.post_layernorm.{leaf}", "post_norm.{leaf}"),
        Drop("vision_model.embeddings.position_ids", COMPUTED),
        Drop("text_model.{rest}", "belongs to the text tower"),
        *(Drop(name, NO_HEAD) for name in ("visual_projection.weight", "text_projection.weight")),
        *(Drop(name, "belongs to the contrastive objective") for name in ("logit_scale", "logit_bias")),
    ]


# ------------------------------------------------------------------------------------------------- language models


def llama(tied: bool = False) -> list[AnyRule]:
    """``LlamaForCausalLM`` ↔ ``decoder``."""
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    return [*_layers(names), *_ends(tied)]


def mistral(tied: bool = False) -> list[AnyRule]:
    """``MistralForCausalLM`` ↔ ``decoder``: Llama's names."""
    return llama(tied)


def qwen2(tied: bool = False) -> list[AnyRule]:
    """``Qwen2ForCausalLM`` ↔ ``decoder``: Llama's names (its biases are leaves of them)."""
    return llama(tied)


def qwen3(tied: bool = False) -> list[AnyRule]:
    """``Qwen3ForCausalLM`` ↔ ``decoder``: Llama's names and the norms of queries and keys."""
    return [*_layers({"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}), *llama(tied)]


def phi3(heads: int, kv_heads: int, head_dim: int, mlp: int, tied: bool = False) -> list[AnyRule]:
    """``Phi3ForCausalLM`` ↔ ``decoder``: queries, keys and values are one matrix in the file, gate and up another."""
    layer, ours = "model.layers.{i}.", "layers.{i}."
    qkv = [ours + f"attn.{x}_proj.weight" for x in "qkv"]
    gate_up = [ours + f"mlp.{x}_proj.weight" for x in ("gate", "up")]
    return [
        split(layer + "self_attn.qkv_proj.weight", qkv, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)),
        split(layer + "mlp.gate_up_proj.weight", gate_up, (mlp, mlp)),
        *llama(tied),
    ]


def internlm2(heads: int, kv_heads: int, head_dim: int, tied: bool = False) -> list[AnyRule]:
    """``InternLM2ForCausalLM`` ↔ ``decoder``: each key head's rows stand after the queries that share it."""
    layer, ours = "model.layers.{i}.", "layers.{i}."
    names = {
        "attention.wo": "attn.o_proj",
        "attention_norm": "attn_norm",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    shared = heads // kv_heads

    def ungroup(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        rows = tensors[0].unflatten(0, (kv_heads, shared + 2, head_dim))  # [groups, queries + key + value, Dh, D]
        return [rows[:, :shared].flatten(0, 2), rows[:, shared].flatten(0, 1), rows[:, shared + 1].flatten(0, 1)]

    def group(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        q, k, v = (x.unflatten(0, (kv_heads, -1, head_dim)) for x in tensors)
        return [torch.cat((q, k, v), dim=1).flatten(0, 2)]  # [(heads + 2 kv_heads) * Dh, D]

    qkv = tuple(ours + f"attn.{x}_proj.weight" for x in "qkv")
    return [
        Rule((layer + "attention.wqkv.weight",), qkv, ungroup, group),
        *_layers(names),
        *_ends(tied, embedding="model.tok_embeddings.weight", head="output.weight"),
    ]


def _layers(names: dict[str, str]) -> list[AnyRule]:
    return [rename("model.layers.{i}." + a + ".{leaf}", "layers.{i}." + b + ".{leaf}") for a, b in names.items()]


def _ends(tied: bool, embedding: str = "model.embed_tokens.weight", head: str = "lm_head.weight") -> list[AnyRule]:
    """Embedding, last norm and head; tables of rotary angles that old files carry are dropped."""
    return [
        rename(embedding, "embedding.weight"),
        rename("model.norm.weight", "norm.weight"),
        Tied(head, embedding) if tied else rename(head, "lm_head.weight"),
        Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", COMPUTED),
        Drop("model.layers.{i}.attention.rotary_emb.inv_freq", COMPUTED),
        Drop("model.rotary_emb.inv_freq", COMPUTED),
    ]


# ------------------------------------------------------------------------------------------------------ projectors


def projector_hf() -> list[AnyRule]:
    """``multi_modal_projector`` of transformers' LLaVA classes ↔ ``mlp`` of depth 2."""
    return [rename("linear_1.{leaf}", "layers.0.{leaf}"), rename("linear_2.{leaf}", "layers.2.{leaf}")]


def projector_mlp() -> list[AnyRule]:
    """``mm_projector`` of the original LLaVA, ``mlpNx_gelu`` ↔ ``mlp`` of depth N: both are numbered alike."""
    return [rename("{i}.{leaf}", "layers.{i}.{leaf}")]


def projector_linear() -> list[AnyRule]:
    """``mm_projector`` of the original LLaVA, ``linear`` ↔ ``linear``."""
    return [rename("{leaf}", "proj.{leaf}")]
