"""Component maps of language models with layer norms: MPT, MosaicGPT and GPT-NeoX ↔ ``gpt``.

Sources: ``modeling_mpt.py`` and ``modeling_gpt_neox.py`` of transformers 5.23; MosaicGPT from the model that
mosaicml/mpt-1b-redpajama-200b publishes with its weights. As in ``maps``, without a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiasm.convert.maps import COMPUTED
from chiasm.convert.rules import Alias, AnyRule, Drop, Rule, Tied, rename, split

_QKV = [f"layers.{{i}}.attn.{x}_proj.{{leaf}}" for x in "qkv"]


def mpt(dim: int) -> list[AnyRule]:
    """``MptForCausalLM``: one matrix for queries, keys and values, no biases, the head is the embedding."""
    names = {
        "norm_1": "attn_norm",
        "attn.out_proj": "attn.o_proj",
        "norm_2": "mlp_norm",
        "ffn.up_proj": "mlp.up_proj",
        "ffn.down_proj": "mlp.down_proj",
    }
    return _mosaic(dim, names, "norm_f")


def mosaic_gpt(dim: int) -> list[AnyRule]:
    """``MosaicGPT``: MPT under its first names, with norms over queries and keys."""
    names = {
        "ln_1": "attn_norm",
        "attn.out_proj": "attn.o_proj",
        "attn.q_ln": "attn.q_norm",
        "attn.k_ln": "attn.k_norm",
        "ln_2": "mlp_norm",
        "mlp.mlp_up": "mlp.up_proj",
        "mlp.mlp_down": "mlp.down_proj",
    }
    return _mosaic(dim, names, "ln_f")


def gpt_neox(heads: int, width: int, tied: bool) -> list[AnyRule]:
    """``GPTNeoXForCausalLM``: the rows of each head are its query, its key and its value."""
    layer, ours = "gpt_neox.layers.{i}.", "layers.{i}."
    names = {
        "input_layernorm": "attn_norm",
        "attention.dense": "attn.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }

    def ungroup(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        rows = tensors[0].unflatten(0, (heads, 3, width))  # [H, 3, Dh, ...]
        return [rows[:, i].flatten(0, 1) for i in range(3)]

    def group(tensors: Sequence[Tensor]) -> Sequence[Tensor]:

        return [torch.stack([x.unflatten(0, (heads, width)) for x in tensors], dim=1).flatten(0, 2)]

    head = (
        Tied("embed_out.weight", "gpt_neox.embed_in.weight") if tied else rename("embed_out.weight", "lm_head.weight")
    )
    return [
        Alias("lm_head.weight", "embed_out.weight"),  # the module's name in version 5
        rename("gpt_neox.embed_in.weight", "embedding.weight"),
        Rule((layer + "attention.query_key_value.{leaf}",), tuple(_QKV), ungroup, group),
        *(rename(layer + a + ".{leaf}", ours + b + ".{leaf}") for a, b in names.items()),
        rename("gpt_neox.final_layer_norm.{leaf}", "norm.{leaf}"),
        head,
        *(Drop(layer + "attention." + name, COMPUTED) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
    ]


def _mosaic(dim: int, names: dict[str, str], last: str) -> list[AnyRule]:
    layer, ours = "transformer.blocks.{i}.", "layers.{i}."
    return [
        rename("transformer.wte.weight", "embedding.weight"),
        split(layer + "attn.Wqkv.{leaf}", _QKV, (dim, dim, dim)),
        *(rename(layer + a + ".{leaf}", ours + b + ".{leaf}") for a, b in names.items()),
        rename(f"transformer.{last}.{{leaf}}", "norm.{leaf}"),
        Tied("lm_head.weight", "transformer.wte.weight"),
    ]
