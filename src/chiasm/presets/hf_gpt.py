"""MPT, MosaicGPT and GPT-NeoX of transformers as ``gpt``, and back: configurations and weight rules.

Reference: the configuration classes of transformers 5.23, whose defaults stand in ``DEFAULTS``; MosaicGPT's of the
model that mosaicml/mpt-1b-redpajama-200b publishes. What ``gpt`` does not express gives None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.convert import maps_gpt
from chiasm.convert.rules import AnyRule
from chiasm.lm.gpt import GPT

DEFAULTS: dict[str, dict[str, Any]] = {
    "mpt": {
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": 50368,
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
        "logit_scale": None,
        "tie_word_embeddings": True,
    },
    "mosaic_gpt": {
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "mlp_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": 50368,
        "attn_qk_ln": False,
        "attn_clip_qkv": None,
        "softmax_scale": None,
        "alibi": False,
        "alibi_bias_max": 8,
        "no_bias": False,
        "logit_scale": None,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
}
_ATTENTION = {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "clip_qkv": None, "softmax_scale": None}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu"}


def read_gpt(values: Mapping[str, Any]) -> tuple[GPT.Config, list[AnyRule]] | None:
    """A configuration of one of the three → ``gpt`` and its rules; None where ``gpt`` cannot express it."""
    kind = values.get("model_type")
    if kind not in DEFAULTS:
        return None
    c = DEFAULTS[kind] | dict(values)
    if kind == "gpt_neox":
        return _neox(c)
    if kind == "mpt":
        attention = _ATTENTION | dict(c.get("attn_config") or {})
        attention["qk_ln"] = False  # transformers' MPT has the key and runs no such norm
        ratio = c["expansion_ratio"]
    else:
        attention = {"alibi": c["alibi"], "alibi_bias_max": c["alibi_bias_max"], "qk_ln": c["attn_qk_ln"]}
        attention |= {"clip_qkv": c["attn_clip_qkv"], "softmax_scale": c["softmax_scale"]}
        ratio = c["mlp_ratio"]
    if not (attention["alibi"] and c["no_bias"]) or attention["softmax_scale"] or c["logit_scale"]:
        return None
    config = GPT.Config.parse(
        {
            "vocab": c["vocab_size"],
            "dim": c["d_model"],
            "depth": c["n_layers"],
            "heads": c["n_heads"],
            "mlp": ratio * c["d_model"],
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "positions": "alibi",
            "alibi_max": attention["alibi_bias_max"],
            "max_positions": c["max_seq_len"],
            "bias": False,
            "qk_norm": attention["qk_ln"],
            "clip": attention["clip_qkv"],
            "tied": True,
        },
        where=f"language model of type {kind!r}",
    )
    return config, gpt_rules(kind, config)


def gpt_rules(kind: str, config: GPT.Config) -> list[AnyRule]:
    """The weight rules of one of the three for a model of these sizes."""
    if kind == "gpt_neox":
        return maps_gpt.gpt_neox(config.heads, config.width, config.tied)
    return {"mpt": maps_gpt.mpt, "mosaic_gpt": maps_gpt.mosaic_gpt}[kind](config.dim)


def _neox(c: Mapping[str, Any]) -> tuple[GPT.Config, list[AnyRule]] | None:
    table = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    scaled = table.get("rope_type", table.get("type", "default")) != "default"
    if scaled or c["hidden_act"] not in _ACTIVATIONS or not c["attention_bias"]:
        return None
    config = GPT.Config.parse(
        {
            "vocab": c["vocab_size"],
            "dim": c["hidden_size"],
            "depth": c["num_hidden_layers"],
            "heads": c["num_attention_heads"],
            "mlp": c["intermediate_size"],
            "activation": _ACTIVATIONS[c["hidden_act"]],
            "norm_eps": c["layer_norm_eps"],
            "rope_theta": table.get("rope_theta", c["rotary_emb_base"]),
            "rotary_share": table.get("partial_rotary_factor", c["rotary_pct"]),
            "max_positions": c["max_position_embeddings"],
            "parallel": c["use_parallel_residual"],
            "tied": c["tie_word_embeddings"],
        },
        where="language model of type 'gpt_neox'",
    )
    return config, gpt_rules("gpt_neox", config)


def write_gpt(c: GPT.Config) -> tuple[dict[str, Any], list[AnyRule]] | None:
    """``gpt`` as a transformers configuration, and its rules; None where no class of it computes the same."""
    if c.positions == "alibi":
        if c.bias or c.qk_norm or c.parallel or not c.tied or c.activation != "gelu" or c.mlp != 4 * c.dim:
            return None
        values: dict[str, Any] = {"model_type": "mpt", "d_model": c.dim, "n_heads": c.heads, "n_layers": c.depth}
        values |= {"max_seq_len": c.max_positions, "vocab_size": c.vocab, "layer_norm_epsilon": c.norm_eps}
        values["attn_config"] = {"alibi": True, "alibi_bias_max": int(c.alibi_max), "clip_qkv": c.clip}
        return values, gpt_rules("mpt", c)
    if not c.bias or c.qk_norm or c.clip is not None:
        return None
    values = {
        "model_type": "gpt_neox",
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation),
        "rotary_pct": c.rotary_share,
        "rotary_emb_base": c.rope_theta,
        "max_position_embeddings": c.max_positions,
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel,
        "tie_word_embeddings": c.tied,
    }
    return values, gpt_rules("gpt_neox", c)
