"""Export to the LLaVA classes of transformers: configuration, weights under their names on disk, processor files.

Which class a composition has is found by what it is made of. What no class can hold is refused by name: a linear
projector, several encoders, unpadding that cuts fractions, a template that no chat template renders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.convert.engine import export_tensors
from chiasm.convert.io import write_json, write_weights
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.fusion.splice import Stream
from chiasm.presets.hf_llava import IMAGE_PROCESSORS, VIDEO_PROCESSORS, rules
from chiasm.presets.hf_parts import write_lm, write_tower
from chiasm.presets.hf_processing import write_image
from chiasm.presets.hf_template import chat_template

CLASSES = {
    "llava": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", "LlavaNextVideoProcessor"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"),
}


def write(folder: Path, vlm: Any, max_shard: int) -> None:
    """Write ``vlm`` into an empty folder. Raises CheckpointError that names what has no counterpart."""
    model = vlm.config.model
    kind, special = family(model)
    vision, tower = write_tower(model.encoders["image"])
    text, lm = write_lm(model.lm)
    front = vlm.processor.config.media["image"]
    image = write_image(front, IMAGE_PROCESSORS[kind], "export")
    grid = image.get("image_grid_pinpoints")
    encoder = model.encoders["image"]
    full = getattr(encoder, "select", "patch") == "cls_patch" or not getattr(encoder, "cls", True)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind][0]],
        "model_type": kind,
        "image_token_index": _token(vlm, "image"),
        "projector_hidden_act": _activation(model.connectors["image"].activation),
        "vision_feature_layer": _layer(encoder),
        "vision_feature_select_strategy": "full" if full else "default",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "text_config": text | {"dtype": str(vlm.dtype).removeprefix("torch.")},
        "vision_config": vision,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "torch_dtype": str(vlm.dtype).removeprefix("torch."),
        **special,
    }
    if grid is not None:
        config["image_grid_pinpoints"] = grid
    tokens = model.unit_count("image", (3, front.size, front.size)).tokens
    if kind != "llava_onevision":
        config["image_seq_length"] = tokens
    if kind in VIDEO_PROCESSORS:
        config["video_token_index"] = _token(vlm, "video")
    tensors = export_tensors(vlm.state_dict(), rules(tower, lm, kind != "llava"))
    _processor_files(folder, vlm, kind, image, encoder, config, tokens)
    write_weights(folder, tensors, max_shard)
    write_json(folder / "config.json", config)


def family(model: Any) -> tuple[str, dict[str, Any]]:
    """The ``model_type`` of a composition and the keys that only it has. Raises CheckpointError."""
    if model.type != "splice":
        raise CheckpointError(f"export: a fusion of type {model.type!r} has no class in transformers")
    lost = []
    if set(model.encoders) != {"image"}:
        lost.append(f"encoders {sorted(model.encoders)} (there is exactly one, of pictures)")
    if set(model.connectors) != {"image"}:
        lost.append(f"connectors {sorted(model.connectors)} (there is exactly one)")
    else:
        c = model.connectors["image"]
        if c.type != "mlp" or c.depth != 2 or c.hidden is not None:
            what = f"{c.type!r}" if c.type != "mlp" else f"mlp with depth={c.depth}, hidden={c.hidden}"
            lost.append(f"connector {what} (only the perceptron of two layers has)")
    if not set(model.media) <= {"image", "video"} or "image" not in model.media:
        lost.append(f"media {sorted(model.media)}")
    if lost:
        raise CheckpointError("export: no class of transformers has a counterpart of " + "; ".join(lost))
    image, video = model.media["image"], model.media.get("video")
    if image.pool is not None:
        raise CheckpointError("export: no class of transformers pools the tokens of pictures")
    if image.merge.type == "flat" and video is None:
        return "llava", {}
    if image.merge.type != "spatial_unpad":
        raise CheckpointError(f"export: no class of transformers has a counterpart of merge {image.merge.type!r} here")
    if image.merge.rounding != "round":
        raise CheckpointError(
            "export: merge.rounding='trunc' has no counterpart: transformers rounds ('round'), which gives other token "
            "counts for a few sizes (748x352 is one); set model.media.image.merge.rounding=round to accept that"
        )
    if not image.merge.base:
        raise CheckpointError("export: merge.base=False has no counterpart in transformers")
    return _video(image, video)


def _video(image: Stream, video: Stream | None) -> tuple[str, dict[str, Any]]:
    """Which of the classes that tile pictures a composition is."""
    merge: Any = image.merge
    if video is None and merge.max_tiles is None:
        return "llava_next", {}
    if video is None:
        raise CheckpointError(
            "export: merge.max_tiles needs LlavaOnevision, which takes video too: add the stream 'video'"
        )
    frames: Any = video.merge
    pool = video.pool
    shape = (pool.mode, pool.stride, video.pool_at) if pool else None
    ended = merge.max_tiles is not None and frames.type == "frames" and frames.newline == "one_token"
    if ended and shape == ("bilinear", 2, "after"):
        return "llava_onevision", {"vision_aspect_ratio": f"anyres_max_{merge.max_tiles}"}
    plain = merge.max_tiles is None and frames.type == "frames" and frames.newline == "none"
    if plain and pool is not None and pool.mode in ("average", "max") and video.pool_at == "before":
        return "llava_next_video", {"spatial_pool_mode": pool.mode, "spatial_pool_stride": pool.stride}
    raise CheckpointError(
        f"export: no class of transformers has a counterpart of video with pool {shape}, newline "
        f"{getattr(frames, 'newline', None)!r} beside max_tiles={merge.max_tiles}"
    )


def _processor_files(
    folder: Path, vlm: Any, kind: str, image: dict[str, Any], encoder: Any, config: dict[str, Any], tokens: int
) -> None:
    """Tokenizer files as they were read, the chat template, and the processor files in version 4's places."""
    processor = vlm.processor
    source = chat_template(processor)
    processor.tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    write_json(folder / "preprocessor_config.json", image | {"processor_class": CLASSES[kind][1]})
    values: dict[str, Any] = {
        "processor_class": CLASSES[kind][1],
        "image_token": processor.config.media["image"].placeholder,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    if kind == "llava_onevision":
        values |= {"num_image_tokens": tokens, "vision_aspect_ratio": config["vision_aspect_ratio"]}
    else:
        own = isinstance(encoder, ViT.Config)
        patch, extra = (encoder.patch, int(encoder.cls)) if own else (encoder.geometry.patch, encoder.geometry.prefix)
        values |= {"patch_size": patch, "num_additional_image_tokens": extra}
    if kind in VIDEO_PROCESSORS:
        video = processor.config.media["video"]
        values["video_token"] = video.placeholder
        table = write_image(video.image, VIDEO_PROCESSORS[kind], "export: video")
        table["video_processor_type"] = table.pop("image_processor_type")
        table |= {"do_sample_frames": False, "num_frames": video.frames, "processor_class": CLASSES[kind][1]}
        write_json(folder / "video_preprocessor_config.json", table)
    write_json(folder / "processor_config.json", values)


def _token(vlm: Any, kind: str) -> int:
    token = vlm.processor.config.media[kind].placeholder
    index = None if token is None else vlm.processor.tokenizer.id_of(token)
    if index is None:
        raise CheckpointError(
            f"export: transformers needs a token for {kind}s in the vocabulary; {token!r} is none: add it to the "
            "tokenizer, and rows to the language model"
        )
    return index


def _layer(encoder: Any) -> int:
    if getattr(encoder, "post_norm", "unused") == "applied":
        raise CheckpointError(
            "export: post_norm='applied' has no counterpart: transformers reads states before that norm"
        )
    if getattr(encoder, "select", "patch") == "cls":
        raise CheckpointError("export: select='cls' has no counterpart in transformers")
    return encoder.layer


def _activation(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
