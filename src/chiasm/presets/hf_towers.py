"""Folders of transformers with two towers, both ways: CLIP, SigLIP (and SigLIP 2), and ALIGN.

Reference: the configuration, processing and model classes of transformers 5.23. A folder is read as transformers reads
it: texts are cleaned by its tokenizer alone and a crop's odd margin is rounded down. Two things are not taken over. In
old folders of CLIP ``eos_token_id`` is 2, which no text ends with; transformers then looks for the largest id, here the
last token is read, and a tokenizer whose texts end otherwise is refused. The running averages of ALIGN's norms keep
torch's meaning of momentum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from chiasm.convert import maps_towers
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import open_weights, write_json, write_weights
from chiasm.encoders.bert import Bert
from chiasm.encoders.efficientnet import EfficientNet
from chiasm.encoders.naflex import NaFlex
from chiasm.encoders.text import TextEncoder
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.fusion.dual_tower import DualTower
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets import hf_align, hf_naflex
from chiasm.presets.checkpoint import Checkpoint, Options, Reader, check_vocab
from chiasm.presets.hf_parts import read_tower, write_tower
from chiasm.presets.hf_processing import processor_values, read_image, write_image
from chiasm.registry import register

_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
TEXT: dict[str, dict[str, Any]] = {
    "clip": _TEXT,
    "siglip": _TEXT
    | {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "align": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
}
TOP: dict[str, dict[str, Any]] = {
    "clip": {"projection_dim": 512, "logit_scale_init_value": 2.6592},
    "siglip": {},
    "siglip2": {},
    "align": {"projection_dim": 640, "temperature_init_value": 1.0},
}
VISION = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "align": "EfficientNetImageProcessor"}
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model", "align": "AlignModel"}
RULES = {
    "clip": maps_towers.clip_hf,
    "siglip": maps_towers.siglip_hf,
    "siglip2": maps_towers.siglip_hf,
    "align": maps_towers.align_hf,
}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
TEXT["siglip2"] = TEXT["siglip"]
SIZES = {  # theirs → ours
    "vocab_size": "vocab",
    "hidden_size": "dim",
    "intermediate_size": "mlp",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "max_position_embeddings": "positions",
    "layer_norm_eps": "norm_eps",
}


@register("checkpoint", "hf_towers")
class HFTowers(Reader):
    """``CLIPModel``, ``SiglipModel``, ``Siglip2Model`` and ``AlignModel``."""

    name = "hf_towers"
    layout = "hf"
    of_towers = True

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_type``."""
        return values.get("model_type") in CLASSES

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, kind = str(folder), values["model_type"]
        tokenizer = Tokenizer.from_folder(folder)
        model = network(kind, values, where)
        _check_end(kind, values, tokenizer, where)
        config = VLMConfig.parse(
            {
                "model": model,
                "processing": {
                    "template": options.template or template(kind, model["encoders"]["text"]["positions"], tokenizer),
                    "media": {"image": image(kind, folder, where)},
                },
                "provenance": Provenance(base={"all": where}),
            },
            where=where,
        )
        check_vocab(config, tokenizer, where)
        return Checkpoint(config, open_weights(folder, options.allow_pickle), RULES[kind](), folder)

    def writes(self, config: VLMConfig) -> bool:
        """Models of two towers."""
        return isinstance(config.model, DualTower.Config)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """See the contract."""
        kind, values = exported(vlm.config.model)
        vlm.processor.tokenizer.save(folder)
        write_json(folder / "preprocessor_config.json", written_image(kind, vlm.processor.config.media["image"]))
        write_weights(folder, export_tensors(vlm.state_dict(), RULES[kind]()), max_shard)
        write_json(folder / "config.json", values | {"dtype": str(vlm.dtype).removeprefix("torch.")})


# ------------------------------------------------------------------------------------------------------------ reading


def network(kind: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The network of a configuration. Raises CheckpointError for what it does not express."""
    c = TOP[kind] | {k: v for k, v in values.items() if v is not None}
    text = TEXT[kind] | _given(c.get("text_config"))
    ours = {SIZES[key]: text[key] for key in SIZES} | {"activation": _activation(text["hidden_act"], where)}
    if kind == "align":
        ours |= {"type": "bert", "kinds": text["type_vocab_size"], "pooler": "unused"}
        return {
            "type": "dual_tower",
            "dim": c["projection_dim"],
            "encoders": {
                "image": hf_align.tower(hf_align.VISION | _given(c.get("vision_config")), where),
                "text": ours,
            },
            "connectors": {
                "image": {"type": "pooled", "pool": "mean", "project": "none"},
                "text": {"type": "pooled", "pool": "first", "project": "linear_bias"},
            },
            "scale": "divisor",
            "scale_init": 1 / c["temperature_init_value"],
            "max_scale": None,
        }
    vision = _given(c.get("vision_config"))
    tower: Any = hf_naflex.tower(vision, where) if kind == "siglip2" else _plain_tower(kind, vision, where)
    encoders = {"image": tower, "text": ours | {"type": "text", "causal": kind == "clip"}}
    if kind == "clip":
        return {
            "type": "dual_tower",
            "dim": c["projection_dim"],
            "encoders": encoders,
            "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
            "scale_init": math.exp(c["logit_scale_init_value"]),
        }
    if vision.get("vision_use_head", True) is not True or text.get("projection_size", tower.dim) != tower.dim:
        raise CheckpointError(
            f"{where}: a SigLIP with vision_use_head={vision.get('vision_use_head', True)} and texts projected to "
            f"{text.get('projection_size')}, pictures of width {tower.dim}, cannot be compared"
        )
    head = {"type": "map_head", "heads": tower.heads, "mlp": tower.mlp}
    return {
        "type": "dual_tower",
        "dim": tower.dim,
        "encoders": encoders,
        "connectors": {
            "image": head | {"activation": tower.activation, "norm_eps": tower.norm_eps},
            "text": {"type": "pooled", "pool": "last", "project": "linear_bias"},
        },
        "scale_init": 10.0,
        "max_scale": None,
        "bias_init": -10.0,
    }


def text_tower(values: Mapping[str, Any], where: str) -> TextEncoder.Config:
    """The tower of a ``CLIPTextModel``, which stands alone (a diffusion model's). Raises CheckpointError."""
    text = TEXT["clip"] | _given(dict(values))
    sizes = {SIZES[key]: text[key] for key in SIZES}
    return TextEncoder.Config.parse(sizes | {"activation": _activation(text["hidden_act"], where)}, where=where)


def _plain_tower(kind: str, values: dict[str, Any], where: str) -> ViT.Config:
    """The vision transformer of a CLIP or of a SigLIP of fixed size."""
    select: Literal["cls", "patch"] = "cls" if kind == "clip" else "patch"
    tower = read_tower(values | {"model_type": VISION[kind]}, select=select).config
    if not isinstance(tower, ViT.Config):
        raise CheckpointError(f"{where}: a vision tower with hidden_act={values.get('hidden_act')!r} is not supported")
    return tower.edit(post_norm="applied")


def template(kind: str, positions: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """How texts are read: SigLIP's filled to the tower's length, and cleaned where its tokenizer does not."""
    if not kind.startswith("siglip"):
        return {"type": "pair", "length": min(positions, 64) if kind == "align" else positions}
    spm = "tokenizer.model" in tokenizer.files.content  # SigLIP's sentencepiece; SigLIP 2 has Gemma's tokenizer.json
    side = tokenizer.files.config.get("padding_side", "right")
    clean = "siglip" if spm else "lower"
    return {"type": "pair", "length": positions, "fill": True, "fill_side": side, "clean": clean}


def image(kind: str, folder: Path, where: str) -> Any:
    """The picture front end. Two towers read one picture as one unit, in no slot, so that there is no placeholder."""
    values = processor_values(folder)["image"]
    if kind == "align":
        return hf_align.image(_given(values), where)
    if kind == "siglip2":
        return hf_naflex.image(values, where)
    return read_image(values, None, PROCESSORS[kind], where)


def _check_end(kind: str, values: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> None:
    """Texts of a CLIP must end with the token that its tower was trained to pool at. Raises CheckpointError."""
    if kind != "clip":
        return
    text = TEXT["clip"] | _given(values.get("text_config"))
    wanted = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    if list(tokenizer.suffix) != [wanted]:
        raise CheckpointError(
            f"{where}: its tokenizer ends a text with ids {list(tokenizer.suffix)}, but the text tower pools at id "
            f"{wanted} (eos_token_id {text['eos_token_id']}); tokenizer and model belong to different checkpoints"
        )


def _given(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if value is not None}


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: a text tower with hidden_act={name!r} is not supported")
    return ACTIVATIONS[name]


# ------------------------------------------------------------------------------------------------------------ writing


def exported(model: DualTower.Config) -> tuple[str, dict[str, Any]]:
    """The class that a configuration fits, and the class's. Raises CheckpointError that names what has no place."""
    text, tower = model.encoders["text"], model.encoders["image"]
    pools = (model.connectors["image"].type, model.connectors["text"].type)
    if isinstance(text, Bert.Config) and isinstance(tower, EfficientNet.Config):
        kind = "align"
    elif isinstance(text, TextEncoder.Config) and isinstance(tower, NaFlex.Config):
        kind = "siglip2"
    elif isinstance(text, TextEncoder.Config) and isinstance(tower, ViT.Config) and pools[1] == "pooled":
        kind = "clip" if text.causal else "siglip"
    else:
        raise CheckpointError(
            f"export: towers of types {tower.type!r} and {text.type!r} have no class in transformers; it holds CLIP "
            "with a vision transformer, SigLIP, SigLIP 2 and ALIGN"
        )
    values = _top(kind, model) | {"model_type": kind, "architectures": [CLASSES[kind]]}
    values |= {"text_config": _text(kind, text, model.dim), "vision_config": _vision(kind, tower)}
    again = DualTower.Config.parse(network(kind, values, "export"))
    lost = [
        f"{key} is {getattr(model, key)}, {getattr(again, key)} there"
        for key in ("encoders", "connectors", "dim", "scale", "max_scale")
        if getattr(again, key) != getattr(model, key)
    ]
    if lost or (model.bias_init is None) != (again.bias_init is None):
        raise CheckpointError(f"export: {CLASSES[kind]} has no counterpart of this model: {'; '.join(lost)[:600]}")
    return kind, values


def written_image(kind: str, front: Any) -> dict[str, Any]:
    """The picture front end as the class's table. Raises CheckpointError where that cannot do it."""
    if kind in ("align", "siglip2"):
        return hf_align.written_image(front) if kind == "align" else hf_naflex.written_image(front)
    return write_image(front, PROCESSORS["clip"], "export")  # one that stretches becomes SigLIP's class


def _top(kind: str, model: DualTower.Config) -> dict[str, Any]:
    if kind == "align":
        return {"projection_dim": model.dim, "temperature_init_value": 1 / model.scale_init}
    if kind == "clip":
        return {"projection_dim": model.dim, "logit_scale_init_value": math.log(model.scale_init)}
    return {}


def _text(kind: str, text: Any, dim: int) -> dict[str, Any]:
    back = {"gelu_tanh": "gelu_pytorch_tanh"}.get(text.activation, text.activation)
    values = {key: getattr(text, ours) for key, ours in SIZES.items()} | {"hidden_act": back}
    if kind == "align":
        return values | {"type_vocab_size": text.kinds, "model_type": "align_text_model"}
    values["model_type"] = f"{kind}_text_model"
    if kind == "clip":
        return values | {"eos_token_id": text.vocab - 1, "bos_token_id": text.vocab - 2, "pad_token_id": text.vocab - 1}
    return values | {"eos_token_id": 1, "pad_token_id": 1, "bos_token_id": None, "projection_size": dim}


def _vision(kind: str, tower: Any) -> dict[str, Any]:
    if kind in ("align", "siglip2"):
        return hf_align.written_tower(tower) if kind == "align" else hf_naflex.written_tower(tower)
    values, _ = write_tower(tower)
    return values | ({"vision_use_head": True} if kind == "siglip" else {})


__all__ = ["HFTowers", "exported", "network"]
