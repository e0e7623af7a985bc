"""Folders of transformers with an Idefics, read and written.

Reference: the configuration, processing and model classes of transformers 5.23. Its processor knows no chat template:
the prompt is a list of texts and pictures, and the templates ``idefics`` and ``idefics_instruct`` write what its
examples write. Added tokens, which have tables of their own there, are the last rows of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.config import diff
from chiasm.convert import maps, maps_flamingo
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import open_weights, write_json, write_weights
from chiasm.convert.rules import AnyRule, prefixed
from chiasm.errors import CheckpointError
from chiasm.fusion.cross_attention import CrossAttention
from chiasm.lm.decoder import Decoder
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options, Reader
from chiasm.presets.hf_llava import check_sizes
from chiasm.presets.hf_parts import read_lm
from chiasm.presets.hf_processing import processor_values, read_image, write_image
from chiasm.registry import register

_TOP = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "alpha_type": "float",
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "max_position_embeddings": 2048,
}
_VISION = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_PERCEIVER = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
_LM_KEYS = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
]
END = "<end_of_utterance>"


@register("checkpoint", "hf_idefics")
class HFIdefics(Reader):
    """``IdeficsForVisionText2Text``, base and instruct."""

    name = "hf_idefics"
    layout = "hf"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type``."""
        return values.get("model_type") == "idefics"

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, c = str(folder), _TOP | dict(values)
        tokenizer = Tokenizer.from_folder(folder)
        tables = processor_values(folder)
        side = tables["image"].get("image_size")  # older folders name the square by one number
        square = {} if side is None else {"size": {"height": side, "width": side}}
        image = read_image(square | tables["image"], "<image>", "IdeficsImageProcessor", where)
        spoken = END in tokenizer.specials
        for token in ("<image>", "<fake_token_around_image>"):
            if token not in tokenizer.specials:
                raise CheckpointError(f"{where}: the tokenizer has no token {token!r}, which Idefics' prompts need")
        model = model_of(c, where)
        config = VLMConfig.parse(
            {
                "model": model,
                "processing": {
                    "template": options.template or ("idefics_instruct" if spoken else "idefics"),
                    "media": {"image": image},
                    "padding_side": tokenizer.files.config.get("padding_side", "left"),
                    "add_bos": True,
                },
                "provenance": Provenance(base={"all": where}),
            },
            where=where,
        )
        check_sizes(config, tokenizer, where)
        weights = open_weights(folder, options.allow_pickle)
        return Checkpoint(config, weights, rules(c, lm_of(c)), folder)

    def writes(self, config: VLMConfig) -> bool:
        """Models that look at pictures from between the layers of a language model."""
        return isinstance(config.model, CrossAttention.Config)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract. The rows after the first ``vocab_size`` go to the tables of added tokens."""
        c = values_of(vlm)
        tensors = export_tensors(vlm.state_dict(), rules(c, vlm.config.model.lm))
        vlm.processor.tokenizer.save(folder)
        image = write_image(vlm.processor.config.media["image"], "IdeficsImageProcessor", "export")
        write_json(folder / "preprocessor_config.json", image | {"processor_class": "IdeficsProcessor"})
        write_weights(folder, tensors, max_shard)
        write_json(folder / "config.json", c)


def rules(c: Mapping[str, Any], lm: Decoder.Config) -> list[AnyRule]:
    """The weight rules of a whole model."""
    vocab, extra = c["vocab_size"], c["additional_vocab_size"]
    return [
        *prefixed(maps_flamingo.idefics_lm(vocab, extra, lm.tied), "", "lm."),
        *prefixed(maps_flamingo.idefics_resampler(), "model.perceiver_resampler.", "connectors.image."),
        *prefixed(
            maps_flamingo.idefics_blocks(c["alpha_type"] == "vector"), "model.gated_cross_attn_layers.", "cross."
        ),
        *prefixed(maps.clip_vit(), "model.", "encoders.image."),
        *prefixed(maps.llama(lm.tied), "", "lm."),
    ]


def lm_of(c: Mapping[str, Any]) -> Decoder.Config:
    """The language model: a LLaMA with rows for the added tokens. Raises CheckpointError."""
    table = {key: c[key] for key in _LM_KEYS}
    rope = {key: c[key] for key in ("rope_parameters", "rope_scaling", "rope_theta") if c.get(key)}
    part = read_lm({"model_type": "llama", "vocab_size": c["vocab_size"] + c["additional_vocab_size"], **table, **rope})
    if not isinstance(part.config, Decoder.Config):
        raise CheckpointError("Idefics: its language model has options that 'decoder' does not know")
    return part.config


def model_of(c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The network of a completed configuration. Raises CheckpointError."""
    v = _VISION | (c.get("vision_config") or {})
    p = _PERCEIVER | (c.get("perceiver_config") or {})
    interval, depth = c["cross_layer_interval"], c["num_hidden_layers"]
    lost = []
    if not c["use_resampler"]:
        lost.append("use_resampler=false (every released Idefics has one)")
    if depth % interval:
        lost.append(f"cross_layer_interval={interval} over {depth} layers, which leaves a layer without its block")
    if v["hidden_act"] not in ("gelu", "quick_gelu"):
        lost.append(f"a tower with hidden_act={v['hidden_act']!r}")
    if lost:
        raise CheckpointError(f"{where}: not supported: {'; '.join(lost)}")
    return {
        "type": "cross_attention",
        "encoders": {"image": tower_of(v)},
        "connectors": {
            "image": {
                "type": "resampler",
                "queries": p["resampler_n_latents"],
                "depth": p["resampler_depth"],
                "heads": p["resampler_n_heads"],
                "head_dim": p["resampler_head_dim"],
                "activation": "relu",
                "head_norm": p["qk_layer_norms_perceiver"],
                "project": False,
            }
        },
        "lm": lm_of(c),
        "placement": {"every": interval, "rule": "before_first"},
        "blocks": {
            "heads": c["num_attention_heads"],
            "head_dim": None,
            "mlp": c["intermediate_size"],
            "gated_mlp": True,
            "activation": c["hidden_act"],
            "norm": "rms",
            "norm_eps": c["rms_norm_eps"],
            "head_norm": c["qk_layer_norms"],
            "gate": {"float": "scalar", "vector": "vector"}[c["alpha_type"]],
        },
        "attend": "last",
    }


def tower_of(v: Mapping[str, Any]) -> dict[str, Any]:
    """A completed ``vision_config`` as ``vit``: CLIP's, read before its last norm with its class vector."""
    return {
        "type": "vit",
        "image_size": v["image_size"],
        "patch": v["patch_size"],
        "dim": v.get("hidden_size", v["embed_dim"]),
        "depth": v["num_hidden_layers"],
        "heads": v["num_attention_heads"],
        "mlp": v["intermediate_size"],
        "channels": v["num_channels"],
        "activation": v["hidden_act"],
        "norm_eps": v["layer_norm_eps"],
        "patch_bias": False,
        "pre_norm": True,
        "post_norm": "unused",
        "select": "cls_patch",
    }


def values_of(vlm: Any) -> dict[str, Any]:
    """The ``config.json`` of a model. Raises CheckpointError where Idefics cannot be configured like it."""
    model = vlm.config.model
    if model.type != "cross_attention" or not isinstance(model.lm, Decoder.Config):
        raise CheckpointError("export: only a fusion 'cross_attention' around a 'decoder' can be an Idefics")
    lm, blocks = model.lm, model.blocks
    tokenizer = vlm.processor.tokenizer
    names = [t for t in ("<fake_token_around_image>", "<image>", END) if t in tokenizer.specials]
    extra = len(names) if sorted(tokenizer.specials[t] for t in names)[:1] == [lm.vocab - len(names)] else 0
    tower = next(iter(model.encoders.values()))
    sampler = next(iter(model.connectors.values()))
    values: dict[str, Any] = {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "vocab_size": lm.vocab - extra,
        "additional_vocab_size": extra,
        "hidden_size": lm.dim,
        "intermediate_size": lm.mlp,
        "num_hidden_layers": lm.depth,
        "num_attention_heads": lm.heads,
        "hidden_act": lm.activation,
        "rms_norm_eps": lm.norm_eps,
        "max_position_embeddings": lm.max_positions,
        "rope_theta": lm.rope_theta,
        "tie_word_embeddings": lm.tied,
        "alpha_type": {"scalar": "float", "vector": "vector"}[blocks.gate],
        "cross_layer_interval": model.placement.every,
        "qk_layer_norms": blocks.head_norm,
        "use_resampler": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "vision_config": {
            "embed_dim": getattr(tower, "dim", None),
            "image_size": getattr(tower, "image_size", None),
            "intermediate_size": getattr(tower, "mlp", None),
            "patch_size": getattr(tower, "patch", None),
            "num_hidden_layers": getattr(tower, "depth", None),
            "num_attention_heads": getattr(tower, "heads", None),
            "num_channels": getattr(tower, "channels", None),
            "hidden_act": getattr(tower, "activation", None),
            "layer_norm_eps": getattr(tower, "norm_eps", None),
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": getattr(sampler, "queries", None),
            "resampler_depth": getattr(sampler, "depth", None),
            "resampler_n_heads": getattr(sampler, "heads", None),
            "resampler_head_dim": getattr(sampler, "head_dim", None),
            "qk_layer_norms_perceiver": getattr(sampler, "head_norm", None),
        },
    }
    _same(model, VLMConfig.parse({"model": model_of(_TOP | values, "export"), "processing": vlm.config.processing}))
    return values


def _same(model: Any, read: VLMConfig) -> None:
    """Raises CheckpointError where reading the file back would give another network."""
    found = {
        k: v
        for k, v in diff(model, read.model).items()
        if k not in ("blocks.gate_start", "connectors.image.latent_std")
    }
    found = {k: v for k, v in found.items() if not (k in ("lm.kv_heads", "lm.head_dim") and None in v)}
    if found:
        listed = ", ".join(f"{key} is {a!r}, there {b!r}" for key, (a, b) in list(found.items())[:6])
        raise CheckpointError(f"export: Idefics of transformers has no counterpart of: {listed}")
