"""Folders of transformers with a BLIP-2 (for writing or for retrieval) or an InstructBLIP, also of clips.

Reference: the configuration, processing and model classes of transformers 5.23. Their processors put the picture's
tokens before the token that opens the text, and know no chat template: the prompt is the user's text. Of a clip their
processor takes four frames; a picture of the class for clips is one medium of its own here, there it is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert import maps_blip
from chiasm.convert.io import Weights, open_weights
from chiasm.convert.rules import AnyRule, prefixed, rename, squeeze
from chiasm.errors import CheckpointError
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets import hf_blip2_retrieval as retrieval
from chiasm.presets.checkpoint import Checkpoint, Options, Reader
from chiasm.presets.hf_llava import check_sizes, check_token
from chiasm.presets.hf_parts import Part, read_lm
from chiasm.presets.hf_processing import processor_values, read_image
from chiasm.registry import register

VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_TOP = {"num_query_tokens": 32, "image_token_index": None, "video_token_index": None}
KINDS = ("blip-2", "instructblip", "instructblipvideo")
FRAMES = 4  # of a clip


@register("checkpoint", "hf_blip2")
class HFBlip2(Reader):
    """``Blip2ForConditionalGeneration``, ``InstructBlip…`` and ``InstructBlipVideoForConditionalGeneration``, with any
    language model, and ``Blip2ForImageTextRetrieval``.
    """

    name = "hf_blip2"
    layout = "hf"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type``."""
        return values.get("model_type") in KINDS

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, c = str(folder), _TOP | dict(values)
        weights = open_weights(folder, options.allow_pickle)
        reads, clips = c["model_type"] != "blip-2", c["model_type"] == "instructblipvideo"
        qformer = QFORMER | (c.get("qformer_config") or {})
        vision = VISION | (c.get("vision_config") or {})
        if qformer["use_qformer_text_input"] and not reads:
            found = bridge(qformer, c["num_query_tokens"], True, where)
            return retrieval.read(
                folder, weights, tower(vision, where), found, c.get("image_text_hidden_size", 256), options
            )
        lm = language_model(c, weights, where)
        tokenizer = Tokenizer.from_folder(folder)
        written = bool(getattr(lm.config, "config", {}).get("is_encoder_decoder", False)) or _is_t5(lm)
        model = {
            "type": "splice",
            "encoders": {"image": tower(vision, where)},
            "connectors": {"image": bridge(qformer, c["num_query_tokens"], reads, where)},
            "lm": lm.config,
            "media": {kind: {"merge": {"type": "flat"}} for kind in (("image", "video") if clips else ("image",))},
        }
        processing = processing_of(folder, c, tokenizer, written, options)
        if reads:
            processing["instruction"] = {"max_length": qformer["max_position_embeddings"]}
            if tokenizer.instruction is None:
                raise CheckpointError(f"{where} has no qformer_tokenizer, which reads the instruction")
        config = VLMConfig.parse(
            {"model": model, "processing": processing, "provenance": Provenance(base={"all": where})}, where=where
        )
        check_sizes(config, tokenizer, where)
        bridge_rules = maps_blip.qformer_instruct() if reads else maps_blip.qformer_blip2()
        return Checkpoint(config, weights, rules(vision, bridge_rules, lm.rules), folder)

    def writes(self, config: VLMConfig) -> bool:
        """Models with one Q-Former."""
        from chiasm.presets.hf_blip2_export import fits

        return fits(config)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract."""
        from chiasm.presets.hf_blip2_export import write

        write(folder, vlm, max_shard)


def rules(vision: Mapping[str, Any], qformer: list[AnyRule], lm: list[AnyRule]) -> list[AnyRule]:
    """The weight rules of a whole model."""
    return [
        *prefixed(maps_blip.eva_vit(vision["hidden_size"]), "vision_model.", "encoders.image."),
        squeeze("query_tokens", "connectors.image.queries"),
        *prefixed(qformer, "qformer.", "connectors.image."),
        rename("language_projection.{leaf}", "connectors.image.proj.{leaf}"),
        *prefixed(lm, "language_model.", "lm."),
    ]


def tower(c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """EVA-CLIP as ``vit``: the class vector kept, the last norm applied."""
    if not c["qkv_bias"] or c["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: a tower with qkv_bias={c['qkv_bias']} and hidden_act={c['hidden_act']!r} is not supported"
        )
    return {
        "type": "vit",
        "image_size": c["image_size"],
        "patch": c["patch_size"],
        "dim": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp": c["intermediate_size"],
        "activation": _ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
        "select": "cls_patch",
    }


def bridge(c: Mapping[str, Any], queries: int, reads: bool, where: str) -> dict[str, Any]:
    """The Q-Former as ``qformer``, with a text half where it reads the instruction."""
    text = {"vocab": c["vocab_size"], "positions": c["max_position_embeddings"]}
    if c["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: a Q-Former with hidden_act={c['hidden_act']!r} is not supported")
    return {
        "type": "qformer",
        "queries": queries,
        "dim": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp": c["intermediate_size"],
        "cross_every": c["cross_attention_frequency"],
        "activation": _ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"],
        **({"text": text, "instruction": True} if reads else {}),
    }


def language_model(c: Mapping[str, Any], weights: Weights, where: str) -> Part:
    """The language model, with a head of its own where the file has one."""
    text = c.get("text_config")
    if not text:
        raise CheckpointError(f"{where}: config.json has no text_config, so its language model is not known")
    values = {"model_type": "opt", **text}
    if values["model_type"] == "t5":
        # transformers 5 writes "tied" whatever the model is; the file and the scaling say how it was trained
        scaled = values.pop("scale_decoder_outputs", values.get("tie_word_embeddings", True))
        own = "language_model.lm_head.weight" in weights.info
        if own == bool(scaled):
            raise CheckpointError(
                f"{where}: its T5 has {'a' if own else 'no'} head of its own but scale_decoder_outputs={scaled}; "
                "T5 scales where the head is the embedding, and only there"
            )
        values["tie_word_embeddings"] = not own
    return read_lm(values)


def processing_of(
    folder: Path, c: Mapping[str, Any], tokenizer: Tokenizer, written: bool, options: Options
) -> dict[str, Any]:
    """The processing of the folder's processor files."""
    tables, where = processor_values(folder), str(folder)
    medium = "video" if c["model_type"] == "instructblipvideo" else "image"
    index = c[f"{medium}_token_index"]
    if index is None:
        raise CheckpointError(
            f"{where}: config.json names no {medium}_token_index, as folders of before transformers 4.46 do; save it "
            "again with a newer version, which adds the token"
        )
    causal = "blip2_opt" if c["model_type"] == "blip-2" else "instructblip"
    token = tokenizer.token_of(index) or ""
    check_token(tokenizer, token, index, medium, where)
    if medium == "image":
        media: dict[str, Any] = {"image": read_image(tables["image"], token, "BlipImageProcessor", where)}
    else:
        table = tables["video"] or tables["image"]
        frames = read_image(table, None, "InstructBlipVideoVideoProcessor", where)
        media = {"image": frames, "video": {"type": "video", "placeholder": token, "frames": FRAMES, "image": frames}}
    return {
        "template": options.template or ("blip2_t5" if written else causal),
        "media": media,
        "padding_side": tokenizer.files.config.get("padding_side", "right"),
        "target": "decoder" if written else "sequence",
        "add_bos": None if written else False,
    }


def _is_t5(lm: Part) -> bool:
    return getattr(lm.config, "config", {}).get("model_type") == "t5"
