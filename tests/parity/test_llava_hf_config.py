"""Configurations of transformers, with what their files leave out, against its configuration classes and models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from hf_folders import CLASSES


def test_omitted_defaults_are_those_of_transformers():
    """A configuration as old files have it, with almost everything left out, against the configuration classes."""
    from chiasm.presets import hf_llava, hf_parts

    for kind, values in hf_parts.DEFAULTS.items():
        if kind == "internlm2":
            continue
        reference = transformers.AutoConfig.for_model(kind)
        for key, value in values.items():
            if value is not None or key == "sliding_window":
                assert getattr(reference, key) == value, (kind, key)
    for kind, values in hf_llava.DEFAULTS.items():
        reference = transformers.AutoConfig.for_model(kind)
        assert {key: getattr(reference, key) for key in values} == values
        part = hf_parts.read_lm({"model_type": reference.text_config.model_type}).config
        assert (part.dim, part.mlp, part.depth) == tuple(
            getattr(reference.text_config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        tower = hf_llava.read_vision(kind, hf_llava.DEFAULTS[kind], "x").config
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
        assert (tower.dim, tower.mlp, tower.depth, tower.image_size, tower.patch) == tuple(
            getattr(reference.vision_config, key) for key in names
        )


CLIP_336 = {
    **{"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096},
    **{
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
PUBLISHED_TOWER = {"model_type": "siglip_vision_model", "vision_use_head": False}
PUBLISHED: dict[str, dict[str, Any]] = {  # config.json as published, defaults left out as there
    "llava-1.5-7b": {
        **{"model_type": "llava", "image_token_index": 32000, "projector_hidden_act": "gelu", "vocab_size": 32064},
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False},
        "text_config": {
            **{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama"},
            **{"rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
        },
        "vision_config": CLIP_336,
    },
    "llava-v1.6-mistral-7b": {
        **{"model_type": "llava_next", "image_token_index": 32000, "use_image_newline_parameter": True},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "text_config": {
            **{"architectures": ["MistralForCausalLM"], "intermediate_size": 14336, "max_position_embeddings": 32768},
            **{"model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0},
            **{"sliding_window": None, "vocab_size": 32064},
        },
        "vision_config": CLIP_336,
    },
    "llava-onevision-qwen2-0.5b": {
        **{"model_type": "llava_onevision", "image_token_index": 151646, "video_token_index": 151647},
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "tie_word_embeddings": True},
        "text_config": {
            **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1000000.0, "vocab_size": 152000},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            **{"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304},
            **{"num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
        },
    },
    "everything left out": {"model_type": "llava_next_video"},
    "everything left out, onevision": {"model_type": "llava_onevision", "vision_config": PUBLISHED_TOWER},
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configurations_at_full_size(name: str):
    """On the meta device: every tensor of transformers' model has its place in ours, with its shape."""
    from chiasm.compose import build_model
    from chiasm.convert.engine import check
    from chiasm.convert.io import Info, Weights
    from chiasm.fusion.splice import Splice
    from chiasm.presets import hf_llava

    values = PUBLISHED[name]
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**values)
        theirs = getattr(transformers, CLASSES[values["model_type"]] + "ForConditionalGeneration")(config)
    model, tower, lm = hf_llava.network(hf_llava.completed(values), name)
    ours = build_model(Splice.Config.parse(model), device="meta")
    tied = theirs.config.tie_word_embeddings
    names = {k: v for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")}
    weights = Weights(name, {k: Info(tuple(v.shape), v.dtype) for k, v in names.items()})
    plan = check(weights, ours.state_dict(), hf_llava.rules(tower.rules, lm.rules, values["model_type"] != "llava"))
    assert not plan.dropped and len(plan.steps) == len(names)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    rope = theirs.config.text_config.rope_parameters["rope_theta"]
    assert (ours.lm.config.rope_theta, ours.lm.config.norm_eps) == (rope, theirs.config.text_config.rms_norm_eps)


def test_omitted_keys_of_image_processors():
    from chiasm.presets.hf_processing import DEFAULTS

    for name, values in DEFAULTS.items():
        cls = getattr(transformers, name + "Pil", None)
        if cls is not None:
            reference = json.loads(cls().to_json_string())
            assert {key: reference.get(key, False) for key in values} == values, name
