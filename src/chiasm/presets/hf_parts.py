"""Language models and towers of transformers as parts of ours, and back: configurations and weight rules.

``read_lm`` and ``read_tower`` take a component's configuration as transformers writes it, defaults left out;
``write_lm`` and ``write_tower`` give it for a part of ours. Reference: the configuration classes of transformers 5.23,
whose defaults stand in ``DEFAULTS`` (a test compares them). What our parts do not express is read as an ``hf`` part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.config import PartConfig, diff
from chiasm.convert import maps
from chiasm.convert.rules import Alias, AnyRule, rename
from chiasm.encoders.hf import HFEncoder
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError, ConfigError
from chiasm.lm.decoder import Decoder
from chiasm.lm.gpt import GPT
from chiasm.lm.hf import HFLM
from chiasm.presets.hf_gpt import read_gpt, write_gpt


@dataclass(frozen=True)
class Part:
    """A part's configuration and the rules for its weights, both without a prefix."""

    config: PartConfig
    rules: list[AnyRule]


_LM = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_LM, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_LM,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_LM, **_QWEN},
    "qwen3": {**_LM, **_QWEN, "head_dim": 128},
    "phi3": {
        **_LM,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "internlm2": {**_LM, "vocab_size": 103168, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
DEFAULTS["siglip_vision_model"] = DEFAULTS["clip_vision_model"] | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DEFAULTS["vit"] = DEFAULTS["clip_vision_model"] | {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # two towers: ours is their vision_config
_LM_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_TOWER_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


# -------------------------------------------------------------------------------------------------- language models


def read_lm(values: Mapping[str, Any], tied: bool | None = None) -> Part:
    """A causal language model's configuration → ``decoder``, or ``hf`` where that cannot express it.

    ``tied`` overrides ``tie_word_embeddings`` (LLaVA keeps it at the top of its configuration). Raises ConfigError.
    """
    kind = values.get("model_type")
    if found := read_gpt(values):
        return Part(*found)
    if kind not in DEFAULTS or kind in ("clip_vision_model", "siglip_vision_model", "vit"):
        return _hf_lm(values)
    c = DEFAULTS[kind] | dict(values)
    window, uniform = _window(kind, c)
    rope = _rope(c)
    if not uniform or c["hidden_act"] not in _LM_ACTIVATIONS or rope is None:
        return _hf_lm(values)
    heads = c["num_attention_heads"]
    bias = bool(c.get("attention_bias", False))
    tied = bool(c["tie_word_embeddings"]) if tied is None else tied
    config = Decoder.Config.parse(
        {
            "vocab": c["vocab_size"],
            "dim": c["hidden_size"],
            "depth": c["num_hidden_layers"],
            "heads": heads,
            "kv_heads": c["num_key_value_heads"] or heads,
            "head_dim": c["head_dim"] if c["head_dim"] != c["hidden_size"] // heads else None,
            "mlp": c["intermediate_size"],
            "activation": _LM_ACTIVATIONS[c["hidden_act"]],
            "norm_eps": c["rms_norm_eps"],
            "max_positions": c["max_position_embeddings"],
            "tied": tied,
            "qkv_bias": kind == "qwen2" or (bias and kind in ("llama", "qwen3")),
            "out_bias": bias and kind in ("llama", "qwen3"),
            "mlp_bias": kind == "llama" and bool(c.get("mlp_bias", False)),
            "qk_norm": kind == "qwen3",
            "sliding_window": window,
            **rope,
        },
        where=f"language model of type {kind!r}",
    )
    if kind == "internlm2" and c.get("bias"):
        raise ConfigError("InternLM2 with biases is not supported: its published checkpoints have none")
    return Part(config, lm_rules(kind, config))


def lm_rules(kind: str, config: Decoder.Config) -> list[AnyRule]:
    """The weight rules of a language model of transformers' ``model_type`` for a decoder of these sizes."""
    sizes = (config.heads, config.kv_heads or config.heads, config.width)
    if kind == "phi3":
        return maps.phi3(*sizes, mlp=config.mlp, tied=config.tied)
    if kind == "internlm2":
        return maps.internlm2(*sizes, tied=config.tied)
    return {"llama": maps.llama, "mistral": maps.mistral, "qwen2": maps.qwen2, "qwen3": maps.qwen3}[kind](config.tied)


def _hf_lm(values: Mapping[str, Any]) -> Part:
    if "model_type" not in values:
        raise ConfigError("the language model's configuration has no 'model_type'")
    config = HFLM.Config(config=dict(values))
    return Part(config, hf_rules(config))


def hf_rules(config: HFLM.Config | HFEncoder.Config) -> list[AnyRule]:
    """The rules of a model that transformers builds: names on disk ↔ names of its modules, where the two differ.

    Version 5 renames modules and keeps the names on disk, by a table of its own that is asked here; version 4 does not.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return [rename("{rest}", "model.{rest}")]
    with torch.device("meta"):
        model: Any = HFLM(config).model if isinstance(config, HFLM.Config) else HFEncoder(config).model
    state = model.state_dict()
    ours = {id(tensor): name for name, tensor in state.items()}
    on_disk = revert_weight_conversion(model, state)
    pairs = [(ours[id(t)], name) for name, t in on_disk.items() if id(t) in ours and ours[id(t)] != name]
    rules: list[AnyRule] = [Alias(module, disk) for module, disk in pairs]
    if not any(name.startswith("vision_model.") for name in on_disk):
        rules.append(Alias("vision_model.{rest}", "{rest}"))
    rules += [rename(disk, "model." + module) for module, disk in pairs]
    return [*rules, rename("{rest}", "model.{rest}")]


def _window(kind: str, c: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The sliding window, and whether all layers have the same."""
    if kind in ("mistral", "phi3"):
        return c["sliding_window"], True
    if kind in ("qwen2", "qwen3") and c.get("use_sliding_window", False):
        full, depth = c.get("max_window_layers", 28), c["num_hidden_layers"]
        computed = ["full_attention" if i < full else "sliding_attention" for i in range(depth)]
        types = set(c.get("layer_types") or computed)
        return (c.get("sliding_window", 4096) if "sliding_attention" in types else None), len(types) == 1
    return None, True


def _rope(c: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary keys of ``decoder``, from transformers 4's or 5's spelling; None where it has no such scaling."""
    table = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if any(isinstance(value, Mapping) for value in table.values()):
        return None  # a table for each type of layer
    kind = table.get("rope_type", table.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)
    theta = table.get("rope_theta", c.get("rope_theta", 10000.0))
    share = table.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if kind == "default":
        return {"rope_theta": theta, "rotary_share": share}
    if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope"):
        return None
    known = set(Decoder.Config.model_fields["rope_scaling"].annotation.__args__[0].model_fields)  # type: ignore[union-attr]
    scaling = {key: value for key, value in table.items() if key in known and value is not None} | {"type": kind}
    if kind in ("yarn", "longrope", "llama3"):
        original = c.get("original_max_position_embeddings") or c["max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", original)
    return {"rope_theta": theta, "rotary_share": share, "rope_scaling": scaling}


def write_lm(config: PartConfig) -> tuple[dict[str, Any], list[AnyRule]]:
    """A language model of ours as a transformers configuration, and its rules. Raises CheckpointError."""
    if isinstance(config, HFLM.Config):
        return dict(config.config), hf_rules(config)
    if isinstance(config, GPT.Config) and (found := write_gpt(config)):
        return found
    if not isinstance(config, Decoder.Config):
        raise CheckpointError(f"a language model of type {config.type!r} has no counterpart in transformers")
    return _write_decoder(config)


def _write_decoder(c: Decoder.Config) -> tuple[dict[str, Any], list[AnyRule]]:
    """Which of transformers' classes a decoder is, its configuration and its rules."""
    if c.rotary_share != 1:
        kind = "phi3"
    elif c.qk_norm:
        kind = "qwen3"
    elif c.qkv_bias and not c.out_bias:
        kind = "qwen2"
    else:
        kind = "mistral" if c.sliding_window else "llama"
    wrong = [
        name
        for name, value, right in (
            ("qkv_bias", c.qkv_bias, {"llama": c.out_bias, "qwen3": c.out_bias, "qwen2": True}.get(kind, False)),
            ("out_bias", c.out_bias, c.qkv_bias if kind in ("llama", "qwen3") else False),
            ("mlp_bias", c.mlp_bias, c.mlp_bias if kind == "llama" else False),
            ("sliding_window", c.sliding_window, c.sliding_window if kind in ("mistral", "phi3") else None),
            ("qk_norm", c.qk_norm, kind == "qwen3"),
        )
        if value != right
    ]
    if wrong:
        raise CheckpointError(f"a decoder like {kind!r} with {', '.join(wrong)} has no counterpart in transformers")
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation)
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "head_dim": c.width,
        "intermediate_size": c.mlp,
        "hidden_act": act,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = c.qkv_bias
    if kind == "llama":
        values["mlp_bias"] = c.mlp_bias
    if kind in ("mistral", "phi3"):
        values["sliding_window"] = c.sliding_window
    if kind == "phi3":
        values["partial_rotary_factor"] = c.rotary_share
        values["pad_token_id"] = None
    if c.rope_scaling is not None:
        scaling = {k: v for k, v in c.rope_scaling.dump().items() if v is not None and k != "type"}
        values["rope_scaling"] = {"rope_type": c.rope_scaling.type, **scaling}
        if kind == "phi3":
            values["original_max_position_embeddings"] = c.rope_scaling.original_max_position_embeddings
    return values, lm_rules(kind, c)


# ----------------------------------------------------------------------------------------------------------- towers


def read_tower(values: Mapping[str, Any], layer: int | None = -1, select: str = "patch") -> Part:
    """A vision model's configuration → ``vit``, read at hidden state ``layer``, or ``hf``. Raises ConfigError."""
    kind = values.get("model_type")
    if kind in _WHOLE:
        values = {"model_type": _WHOLE[kind], **(values.get("vision_config") or {})}
        kind = values["model_type"] = _WHOLE[kind]
    if kind not in ("clip_vision_model", "siglip_vision_model", "vit"):
        return _hf_tower(values, layer, select)
    c = DEFAULTS[kind] | dict(values)
    if c["hidden_act"] not in _TOWER_ACTIVATIONS or (kind == "vit" and not c.get("qkv_bias", True)):
        return _hf_tower(values, layer, select)
    vit = ViT.Config.parse(
        {
            "image_size": c["image_size"],
            "patch": c["patch_size"],
            "dim": c["hidden_size"],
            "depth": c["num_hidden_layers"],
            "heads": c["num_attention_heads"],
            "mlp": c["intermediate_size"],
            "channels": c["num_channels"],
            "activation": _TOWER_ACTIVATIONS[c["hidden_act"]],
            "norm_eps": c["layer_norm_eps"],
            "cls": kind != "siglip_vision_model",
            "patch_bias": kind != "clip_vision_model",
            "pre_norm": kind == "clip_vision_model",
            "post_norm": "unused",  # hidden states of transformers are those before the last norm
            "layer": layer,
            "select": select,
        },
        where=f"tower of type {kind!r}",
    )
    return Part(vit, tower_rules(kind))


def _hf_tower(values: Mapping[str, Any], layer: int | None, select: str) -> Part:
    config = HFEncoder.Config.parse({"config": dict(values), "layer": layer, "select": select})
    return Part(config, hf_rules(config))


def tower_rules(kind: str) -> list[AnyRule]:
    """The weight rules of a tower of transformers' ``model_type``."""
    return {"clip_vision_model": maps.clip_vit, "siglip_vision_model": maps.siglip_vit, "vit": maps.vit}[kind]()


def write_tower(config: PartConfig) -> tuple[dict[str, Any], list[AnyRule]]:
    """A tower of ours as a transformers configuration, and its rules. Raises CheckpointError where it has none."""
    if isinstance(config, HFEncoder.Config):
        return dict(config.config), hf_rules(config)
    if not isinstance(config, ViT.Config):
        raise CheckpointError(f"an encoder of type {config.type!r} has no counterpart in transformers")
    c = config
    kinds = {
        (True, False, True): "clip_vision_model",  # cls, patch_bias, pre_norm
        (False, True, False): "siglip_vision_model",
        (True, True, False): "vit",
    }
    kind = kinds.get((c.cls, c.patch_bias, c.pre_norm))
    if kind is None or c.positions != "learnable" or c.post_norm == "none":
        raise CheckpointError(
            f"a vit with cls={c.cls}, patch_bias={c.patch_bias}, pre_norm={c.pre_norm}, positions={c.positions!r}, "
            f"post_norm={c.post_norm!r} has no counterpart in transformers"
        )
    values: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": c.dim,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_channels": c.channels,
        "image_size": c.image_size,
        "patch_size": c.patch,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        "layer_norm_eps": c.norm_eps,
    }
    if kind == "siglip_vision_model":
        values["vision_use_head"] = False
    return values, tower_rules(kind)


READING = ("layer", "select", "post_norm")  # how a tower is read; not part of what its weights are


def same_part(ours: PartConfig, theirs: PartConfig) -> dict[str, tuple[Any, Any]]:
    """Keys in which two parts differ, with both values, apart from how a tower is read."""
    found = diff(_spelled_out(ours), _spelled_out(theirs))
    return {key: pair for key, pair in found.items() if key not in READING}


def _spelled_out(config: PartConfig) -> PartConfig:
    """Without the defaults that follow from other keys."""
    if isinstance(config, Decoder.Config):
        return config.model_copy(update={"kv_heads": config.kv_heads or config.heads, "head_dim": config.width})
    return config
