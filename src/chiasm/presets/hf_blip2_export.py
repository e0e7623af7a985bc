"""Export to transformers' ``Blip2ForConditionalGeneration``, ``InstructBlip…`` and ``InstructBlipVideo…``, and
``Blip2ForImageTextRetrieval``: configuration, weights under their names, tokenizers and processor files.

What was written is understood again before anything stands there for good: where reading would give another network, or
a processor of transformers other ids or pixels, the export is refused with the keys in which the two differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.config import diff
from chiasm.connectors.qformer import QFormer
from chiasm.convert import maps_blip
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import write_json, write_weights
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.fusion.query_text import QueryText
from chiasm.fusion.splice import Splice
from chiasm.lm.tokenizer_files import NAMES, SECOND, SECOND_FOLDER
from chiasm.model_config import VLMConfig
from chiasm.presets import hf_blip2, hf_blip2_retrieval
from chiasm.presets.checkpoint import Options
from chiasm.presets.hf_parts import write_lm
from chiasm.presets.hf_processing import write_image

CLASSES = {  # model_type → class, processor
    "blip-2": ("Blip2ForConditionalGeneration", "Blip2Processor"),
    "instructblip": ("InstructBlipForConditionalGeneration", "InstructBlipProcessor"),
    "instructblipvideo": ("InstructBlipVideoForConditionalGeneration", "InstructBlipVideoProcessor"),
}
RETRIEVAL = "Blip2ForImageTextRetrieval"
SAME = ("template", "media.", "target", "add_bos", "decoder_start", "instruction")
ACTIVATIONS = {"gelu_tanh": "gelu_new"}


def fits(config: VLMConfig) -> bool:
    """Whether a model of this configuration is of this family: one Q-Former called ``image``."""
    model = config.model
    joined = isinstance(model, (Splice.Config, QueryText.Config)) and set(model.connectors) == {"image"}
    return joined and isinstance(model.connectors["image"], QFormer.Config)


def write(folder: Path, vlm: Any, max_shard: int) -> None:
    """Write ``vlm`` into an empty folder. Raises CheckpointError that names what has no counterpart."""
    model, processing = vlm.config.model, vlm.processor.config
    kind, bridge, tower = family(model)
    vision = vision_values(tower)
    values: dict[str, Any] = {
        "architectures": [CLASSES[kind][0]],
        "model_type": kind,
        "num_query_tokens": bridge.queries,
        "vision_config": vision | {"model_type": f"{kind.replace('-', '_')}_vision_model"},
        "qformer_config": qformer_values(bridge, tower.dim) | {"model_type": f"{kind.replace('-', '_')}_qformer"},
        "dtype": str(vlm.dtype).removeprefix("torch."),
    }
    if isinstance(model, QueryText.Config):
        if model.writes:
            raise CheckpointError(
                "export: transformers has no first stage of BLIP-2 that writes; LAVIS has: export(folder, 'lavis')"
            )
        values |= {"architectures": [RETRIEVAL], "image_text_hidden_size": model.dim}
        values["qformer_config"]["use_qformer_text_input"] = True
        tensors = export_tensors(vlm.state_dict(), hf_blip2_retrieval.rules(tower.dim))
    else:
        text, lm = write_lm(model.lm)
        medium = "video" if kind == "instructblipvideo" else "image"
        values |= {f"{medium}_token_index": _token(vlm, medium), "text_config": text}
        bridge_rules = maps_blip.qformer_blip2() if bridge.text is None else maps_blip.qformer_instruct()
        tensors = export_tensors(vlm.state_dict(), hf_blip2.rules(vision, bridge_rules, lm))
    _tokenizers(folder, vlm)
    _processors(folder, processing, kind, bridge.queries)
    write_weights(folder, tensors, max_shard)
    write_json(folder / "config.json", values)
    _same(vlm.config, hf_blip2.HFBlip2().read(folder, values, Options()).config)


def family(model: Any) -> tuple[str, QFormer.Config, ViT.Config]:
    """The ``model_type``, the query transformer and the tower. Raises CheckpointError."""
    lost = [] if set(model.encoders) == {"image"} else [f"encoders {sorted(model.encoders)} (it has 'image')"]
    bridge, tower = model.connectors["image"], model.encoders.get("image")
    if not isinstance(tower, ViT.Config):
        lost.append(f"a tower of type {getattr(tower, 'type', None)!r} (it has EVA-CLIP, a 'vit')")
    if lost:
        raise CheckpointError(f"export: BLIP-2 of transformers has no counterpart of {'; '.join(lost)}")
    assert isinstance(tower, ViT.Config)
    reads = isinstance(model, Splice.Config) and bridge.text is not None
    video = isinstance(model, Splice.Config) and "video" in model.media
    if video and not reads:
        raise CheckpointError("export: transformers reads clips with InstructBLIP only, which reads the question too")
    return "instructblipvideo" if video else "instructblip" if reads else "blip-2", bridge, tower


def vision_values(c: ViT.Config) -> dict[str, Any]:
    """``vision_config`` of a tower."""
    return {
        "hidden_size": c.dim,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "image_size": c.image_size,
        "patch_size": c.patch,
        "hidden_act": ACTIVATIONS.get(c.activation, c.activation),
        "layer_norm_eps": c.norm_eps,
        "qkv_bias": True,
    }


def qformer_values(c: QFormer.Config, source: int) -> dict[str, Any]:
    """``qformer_config`` of a query transformer that looks at vectors of width ``source``."""
    text = {} if c.text is None else {"vocab_size": c.text.vocab, "max_position_embeddings": c.text.positions}
    return {
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": ACTIVATIONS.get(c.activation, c.activation),
        "layer_norm_eps": c.norm_eps,
        "cross_attention_frequency": c.cross_every,
        "encoder_hidden_size": source,
        **text,
    }


def _tokenizers(folder: Path, vlm: Any) -> None:
    """The language model's files beside the configuration, those of the query transformer in their own folder."""
    content: Mapping[str, bytes] = vlm.processor.tokenizer.files.content
    side = {"padding_side": vlm.processor.config.padding_side}
    for name in (n for n in NAMES if n in content):
        second = name.startswith(SECOND)
        place = folder / SECOND_FOLDER / name.removeprefix(SECOND) if second else folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content[name])
        if name == "tokenizer_config.json":
            place.write_text(json.dumps(json.loads(content[name]) | side, ensure_ascii=False), encoding="utf-8")


def _processors(folder: Path, processing: Any, kind: str, queries: int) -> None:
    """The picture's table, the clip's where there is one, and what the processor class is made with."""
    made = {"processor_class": CLASSES[kind][1]}
    image = processing.media.get("image")
    clip = processing.media.get("video")
    if image is not None:
        write_json(folder / "preprocessor_config.json", write_image(image, "BlipImageProcessor", "export") | made)
    if clip is not None:
        table = write_image(clip.image, "BlipImageProcessor", "export: clips")
        table["video_processor_type"] = "InstructBlipVideoVideoProcessor"
        table.pop("image_processor_type")
        write_json(folder / "video_preprocessor_config.json", table | made)
    write_json(folder / "processor_config.json", made | {"num_query_tokens": queries})


def _token(vlm: Any, kind: str) -> int:
    token = vlm.processor.config.media[kind].placeholder
    index = None if token is None else vlm.processor.tokenizer.id_of(token)
    if index is None:
        raise CheckpointError(
            f"export: transformers needs a token for {kind}s in the vocabulary; {token!r} is none: add it to the "
            f"tokenizer (tokenizer.with_controls(['<{kind}>'])), a row to the language model, and name it in "
            f"processing.media.{kind}.placeholder"
        )
    return index


def _same(ours: VLMConfig, read: VLMConfig) -> None:
    """Raises CheckpointError where the folder read back would be another model, or ask it otherwise."""
    found = {f"model.{key}": pair for key, pair in diff(ours.model, read.model).items()}
    found |= {
        f"processing.{key}": pair
        for key, pair in diff(ours.processing, read.processing).items()
        if key.startswith(SAME)
    }
    found = {k: v for k, v in found.items() if k not in ("model.lm.kv_heads", "model.lm.head_dim") or None not in v}
    if found:
        listed = ", ".join(f"{key} is {a!r}, there {b!r}" for key, (a, b) in list(found.items())[:6])
        raise CheckpointError(f"export: BLIP-2 and InstructBLIP of transformers have no counterpart of: {listed}")
