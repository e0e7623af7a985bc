"""Folders of transformers with a LLaVA: Llava, LlavaNext, LlavaNextVideo, LlavaOnevision, written by version 4 or 5.

Reference: the configuration, processing and model classes of transformers 5.23, and ``conversion_mapping.py`` for the
spellings of tensor names. Both the names on disk and those of the modules of either version are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert import maps
from chiasm.convert.io import open_weights
from chiasm.convert.rules import Alias, AnyRule, prefixed, rename
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options, Reader, check_vocab
from chiasm.presets.hf_parts import Part, read_lm, read_tower
from chiasm.presets.hf_processing import (
    NEXT_PINPOINTS,
    ONEVISION_PINPOINTS,
    processor_values,
    read_image,
    read_video,
)
from chiasm.registry import register

_CLIP_336 = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}
_BASE = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": _BASE,
    "llava_next": {**_BASE, "image_grid_pinpoints": NEXT_PINPOINTS},
    "llava_next_video": {
        **_BASE,
        "image_token_index": 32001,
        "video_token_index": 32000,
        "image_grid_pinpoints": NEXT_PINPOINTS,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
    "llava_onevision": {
        **_BASE,
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
    },
}
IMAGE_PROCESSORS = {
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_next_video": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
VIDEO_PROCESSORS = {
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
}


@register("checkpoint", "hf_llava")
class HFLlava(Reader):
    """The LLaVA classes of transformers."""

    name = "hf"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type``, and by what the original LLaVA's configuration has and theirs has not."""
        return values.get("model_type") in DEFAULTS and "mm_vision_tower" not in values

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, kind, c = str(folder), values["model_type"], completed(values)
        model, tower, lm = network(c, where)
        tokenizer = Tokenizer.from_folder(folder)
        processing = _processing(kind, c, folder, tokenizer, options)
        config = VLMConfig.parse(
            {"model": model, "processing": processing, "provenance": Provenance(base={"all": where})}, where=where
        )
        check_sizes(config, tokenizer, where)
        weights = open_weights(folder, options.allow_pickle)
        return Checkpoint(config, weights, rules(tower.rules, lm.rules, kind != "llava"), folder)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract."""
        from chiasm.presets.hf_export import write

        write(folder, vlm, max_shard)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of its class, which files leave out."""
    return DEFAULTS[values["model_type"]] | {key: value for key, value in values.items() if value is not None}


def network(c: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Part, Part]:
    """The fusion configuration of a completed configuration, and the tower and language model in it."""
    if not c["multimodal_projector_bias"]:
        raise CheckpointError(f"{where}: a projector without bias is not supported")
    kind = c["model_type"]
    tower, lm = read_vision(kind, c, where), read_text(kind, c)
    model = {
        "type": "splice",
        "encoders": {"image": tower.config},
        "connectors": {"image": {"type": "mlp", "depth": 2, "activation": _activation(c["projector_hidden_act"])}},
        "lm": lm.config,
        "media": _media(kind, c, where),
    }
    return model, tower, lm


def read_vision(kind: str, c: Mapping[str, Any], where: str) -> Part:
    """The tower of a completed configuration, read at its layer."""
    one, two = (_SO400M, "siglip_vision_model") if kind == "llava_onevision" else (_CLIP_336, "clip_vision_model")
    values = c.get("vision_config")
    values = dict(one) if values is None else {"model_type": two, **values}
    layer, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    if isinstance(layer, list):
        if len(layer) != 1:
            raise CheckpointError(f"{where}: vision_feature_layer {layer} joins several layers, which is not supported")
        layer = layer[0]
    first = values["model_type"] in ("clip_vision_model", "vit", "clip")
    if strategy == "default" and values["model_type"] in ("siglip_vision_model", "siglip"):
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy 'default' drops the first vector, but this tower has no "
            "class vector: it would drop a patch; set it to 'full'"
        )
    return read_tower(values, layer, "cls_patch" if strategy == "full" and first else "patch")


def read_text(kind: str, c: Mapping[str, Any]) -> Part:
    """The language model of a completed configuration."""
    values = c.get("text_config") or {}
    values = {"model_type": "qwen2" if kind == "llava_onevision" else "llama", **values}
    tied = bool(c["tie_word_embeddings"]) or (kind != "llava_next" and bool(values.get("tie_word_embeddings")))
    return read_lm(values, tied)


def rules(tower: list[AnyRule], lm: list[AnyRule], newline: bool) -> list[AnyRule]:
    """The weight rules of a whole model: on disk ``language_model.model.*``, in version 5's modules ``model.*``."""
    return [
        Alias("model.language_model.{rest}", "language_model.model.{rest}"),
        Alias("model.vision_tower.{rest}", "vision_tower.{rest}"),
        Alias("model.multi_modal_projector.{rest}", "multi_modal_projector.{rest}"),
        Alias("model.image_newline", "image_newline"),
        Alias("lm_head.{rest}", "language_model.lm_head.{rest}"),
        *prefixed(tower, "vision_tower.", "encoders.image."),
        *prefixed(maps.projector_hf(), "multi_modal_projector.", "connectors.image."),
        *([rename("image_newline", "newline")] if newline else []),
        *prefixed(lm, "language_model.", "lm."),
    ]


def check_sizes(config: VLMConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raises CheckpointError where tokenizer and model, or pictures and tower, have other sizes."""
    check_vocab(config, tokenizer, where)
    tower = config.model.encoders["image"]
    front = config.processing.media["image"]
    if isinstance(tower, ViT.Config) and front.size != tower.image_size:
        raise CheckpointError(
            f"{where}: the image processor gives pictures of {front.size} pixels, the tower was made for "
            f"{tower.image_size}; mend preprocessor_config.json or config.json"
        )


def _media(kind: str, c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The streams of the model: how units become a run of tokens."""
    if kind == "llava":
        return {"image": {"merge": {"type": "flat"}}}
    merge: dict[str, Any] = {"type": "spatial_unpad", "rounding": "round"}
    if kind == "llava_onevision":
        ratio = c["vision_aspect_ratio"]
        number = ratio.removeprefix("anyres_max_")
        if number == ratio or not number.isdigit():
            raise CheckpointError(f"{where}: vision_aspect_ratio {ratio!r} is not of the form 'anyres_max_9'")
        pool = {"mode": "bilinear", "stride": 2}
        video = {"pool": pool, "pool_at": "after", "merge": {"type": "frames", "newline": "one_token"}}
        return {"image": {"merge": {**merge, "max_tiles": int(number)}}, "video": video}
    if kind == "llava_next":
        return {"image": {"merge": merge}}
    if c["spatial_pool_mode"] not in ("average", "max"):
        raise CheckpointError(
            f"{where}: spatial_pool_mode {c['spatial_pool_mode']!r} is not supported, average and max are"
        )
    pool = {"mode": c["spatial_pool_mode"], "stride": c["spatial_pool_stride"]}
    video = {"pool": pool, "pool_at": "before", "merge": {"type": "frames", "newline": "none"}}
    return {"image": {"merge": merge}, "video": video}


def _processing(
    kind: str, c: Mapping[str, Any], folder: Path, tokenizer: Tokenizer, options: Options
) -> dict[str, Any]:
    """The processing of the folder's processor files."""
    tables, where = processor_values(folder), str(folder)
    image_token = tables["processor"].get("image_token") or "<image>"
    check_token(tokenizer, image_token, c["image_token_index"], "image", where)
    image = read_image(tables["image"], image_token, IMAGE_PROCESSORS[kind], where)
    if image.tiling is not None and [list(p) for p in image.tiling.pinpoints] != [
        list(p) for p in c.get("image_grid_pinpoints", [])
    ]:
        raise CheckpointError(f"{where}: image_grid_pinpoints differ between config.json and the image processor")
    media: dict[str, Any] = {"image": image}
    if kind in VIDEO_PROCESSORS:
        video_token = tables["processor"].get("video_token") or "<video>"
        check_token(tokenizer, video_token, c["video_token_index"], "video", where)
        media["video"] = read_video(tables["video"], tables["image"], video_token, VIDEO_PROCESSORS[kind], where)
    template = options.template
    if template is None:
        source = tokenizer.chat_template or tables["processor"].get("chat_template")
        if source is None:
            raise CheckpointError(
                f"{where} has no chat template (chat_template.jinja, or a key of tokenizer_config.json); name one of "
                "the published templates: load(..., template='vicuna_v1')"
            )
        template = {"type": "jinja", "source": source}
    side = tokenizer.files.config.get("padding_side", "right")
    return {"template": template, "media": media, "padding_side": side}


def check_token(tokenizer: Tokenizer, token: str, index: int, kind: str, where: str) -> None:
    """Raises CheckpointError where tokenizer and model disagree about a placeholder."""
    found = tokenizer.id_of(token)
    if found != index:
        raise CheckpointError(
            f"{where}: the model's {kind}_token_index is {index}, the tokenizer's id of {token!r} is {found}; they "
            "belong to different checkpoints"
        )


def _activation(name: str) -> str:
    known = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
    known |= {"relu": "relu", "silu": "silu"}
    if name not in known:
        raise CheckpointError(f"projector_hidden_act {name!r} is not supported; supported: {', '.join(known)}")
    return known[name]
