"""Folders of the original LLaVA (haotian-liu/LLaVA) and of LLaVA-VL/LLaVA-NeXT, with LLaVA's own conventions.

Reference: ``llava_arch.py``, ``builder.py`` and ``clip_encoder.py`` of LLaVA c121f04 and of LLaVA-NeXT df17966.
The configuration is that of the language model with ``mm_*`` keys; pinpoints are (width, height), unpadding truncates.

Differences by design: a tower that the checkpoint holds is always used (the reference loads the published one again for
LLaVA-1.5); one that it does not hold must be given as a folder; the prompt is chosen by what the folder holds, and by
``template=``, never by the folder's name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.convert import maps
from chiasm.convert.io import Joined, Renamed, Weights, open_weights, read_json
from chiasm.convert.rules import Alias, AnyRule, Drop, prefixed, rename
from chiasm.encoders.vit import ViT, clip_vit_l14, clip_vit_l14_336, siglip_so400m_14_384_26
from chiasm.errors import CheckpointError, nearest
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import Checkpoint, Options, Reader, check_vocab
from chiasm.presets.hf_parts import read_lm, read_tower, tower_rules
from chiasm.processing.image import CLIP_MEAN, CLIP_STD
from chiasm.processing.tiling import pinpoints
from chiasm.registry import register

LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
TOWERS = {  # the published towers that checkpoints name without holding their configuration
    "openai/clip-vit-large-patch14": clip_vit_l14(),
    "openai/clip-vit-large-patch14-336": clip_vit_l14_336(),
    "google/siglip-so400m-patch14-384": siglip_so400m_14_384_26(),
}
MERGES: dict[str, dict[str, Any]] = {
    "flat": {"type": "flat"},
    "spatial": {"type": "spatial"},
    "spatial_nobase": {"type": "spatial", "base": False},
    "spatial_maxpool2x2": {"type": "spatial", "max_pool": 2},
    "spatial_unpad": {"type": "spatial_unpad", "rounding": "trunc"},
    "spatial_unpad_nobase": {"type": "spatial_unpad", "rounding": "trunc", "base": False},
}
NEWLINES = {"no_token": "none", "one_token": "one_token", "frame": "frame", "grid": "grid"}


@register("checkpoint", "original_llava")
class OriginalLlava(Reader):
    """The layout in which LLaVA's authors publish their checkpoints."""

    name = "llava"
    takes_tower = True

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By the key that names the tower, which no other layout has."""
        return "mm_vision_tower" in values

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where = str(folder)
        kind = LANGUAGE_MODELS.get(values.get("model_type", ""))
        if kind is None:
            raise CheckpointError(
                f"{where}: model_type {values.get('model_type')!r} is not supported; {nearest('', LANGUAGE_MODELS)}"
            )
        lm = read_lm({**values, "model_type": kind})
        tower, tower_map = _tower(values, options, where)
        tokenizer = Tokenizer.from_folder(folder)
        media, fronts = _media(values, tower, where)
        config = VLMConfig.parse(
            {
                "model": {
                    "type": "splice",
                    "encoders": {"image": tower},
                    "connectors": {"image": _projector(values.get("mm_projector_type") or "linear", where)},
                    "lm": lm.config,
                    "media": media,
                },
                "processing": {
                    "template": _template(values, tokenizer, kind, options),
                    "media": fronts,
                    "max_length": values.get("tokenizer_model_max_length"),
                    "padding_side": values.get("tokenizer_padding_side") or "right",
                },
                "provenance": Provenance(base={"all": where}),
            },
            where=where,
        )
        check_vocab(config, tokenizer, where)
        weights = open_weights(folder, options.allow_pickle)
        weights = _with_tower(weights, str(values["mm_vision_tower"]), options, where)
        projector = (
            maps.projector_linear() if config.model.connectors["image"].type == "linear" else maps.projector_mlp()
        )
        newline: AnyRule = rename("image_newline", "newline")
        if not config.model.needs_newline():
            newline = Drop("image_newline", "is not read: the merge of this configuration ends no rows")
        rules: list[AnyRule] = [
            Alias("model.vision_tower.vision_tower.{rest}", "vision_tower.{rest}"),
            Alias("model.mm_projector.{rest}", "mm_projector.{rest}"),
            Alias("model.image_newline", "image_newline"),
            *prefixed(tower_map, "vision_tower.", "encoders.image."),
            *prefixed(projector, "mm_projector.", "connectors.image."),
            newline,
            *prefixed(lm.rules, "", "lm."),
        ]
        return Checkpoint(config, weights, rules, folder)


def _tower(values: Mapping[str, Any], options: Options, where: str) -> tuple[ViT.Config, list[AnyRule]]:
    """The tower's configuration, read where LLaVA reads it, and its weight rules."""
    name = values["mm_vision_tower"]
    layer, select = values.get("mm_vision_select_layer", -2), values.get("mm_vision_select_feature") or "patch"
    if options.vision_tower is not None:
        tower: Any = read_tower(read_json(options.vision_tower / "config.json")).config
    elif name in TOWERS:
        tower = TOWERS[name]
    else:
        raise CheckpointError(
            f"{where}: its mm_vision_tower {name!r} is none of the known ones ({', '.join(TOWERS)}); pass its folder: "
            "load(..., vision_tower=FOLDER)"
        )
    if not isinstance(tower, ViT.Config):
        raise CheckpointError(f"{where}: a tower of type {tower.type!r} is not supported in this layout")
    rules: list[AnyRule] = []
    if tower.cls:  # CLIP
        tower = tower.edit(layer=layer, select=select, post_norm="unused")
    else:  # SigLIP: the reference deletes the last block and reads what is then the last state, whatever the keys say
        if options.vision_tower is not None:
            last = tower.depth - 1
            rules.append(
                Drop(f"vision_model.encoder.layers.{last}." + "{rest}", "the reference deletes the last block")
            )
            tower = tower.edit(depth=last)
        tower = tower.edit(layer=-1, post_norm="unused")
    if values.get("mm_hidden_size") not in (None, tower.dim):
        raise CheckpointError(
            f"{where}: mm_hidden_size is {values['mm_hidden_size']}, but the tower {name!r} has width {tower.dim}"
        )
    kind = "clip_vision_model" if tower.pre_norm else "vit" if tower.cls else "siglip_vision_model"
    return tower, rules + tower_rules(kind)


def _with_tower(weights: Weights, name: str, options: Options, where: str) -> Weights:
    """The weights with those of the tower, which LLaVA-1.5 leaves to another repository."""
    prefix = "model.vision_tower.vision_tower."
    if any(key.startswith(prefix) for key in weights.info):
        return weights
    if options.vision_tower is None:
        raise CheckpointError(
            f"{where} does not hold the weights of its tower {name!r}; pass the folder that does: "
            "load(..., vision_tower=FOLDER)"
        )
    return Joined([weights, Renamed(open_weights(options.vision_tower, options.allow_pickle), prefix)])


def _projector(name: str, where: str) -> dict[str, Any]:
    if name == "linear":
        return {"type": "linear"}
    found = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if found is None:
        raise CheckpointError(f"{where}: mm_projector_type {name!r} is not supported; 'linear' and 'mlpNx_gelu' are")
    return {"type": "mlp", "depth": int(found[1]), "activation": "gelu"}


def _media(values: Mapping[str, Any], tower: ViT.Config, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The streams of the model and the front ends of the processing."""
    ratio = values.get("image_aspect_ratio") or "square"
    merge_name = values.get("mm_patch_merge_type") or "flat"
    if merge_name not in MERGES:
        raise CheckpointError(
            f"{where}: mm_patch_merge_type {merge_name!r} is not supported; {nearest(merge_name, MERGES)}"
        )
    merge = dict(MERGES[merge_name])
    most = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if ratio not in ("square", "pad", "anyres") and most is None:
        raise CheckpointError(
            f"{where}: image_aspect_ratio {ratio!r} is not supported; 'square', 'pad', 'anyres' and 'anyres_max_N' are"
        )
    if most is not None and merge["type"] == "spatial_unpad":
        merge["max_tiles"] = int(most[1])
    plain = "crop" if tower.pre_norm else "squash"
    stats = {"mean": CLIP_MEAN, "std": CLIP_STD} if tower.pre_norm else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    front: dict[str, Any] = {"type": "image", "placeholder": None, "size": tower.image_size, **stats}
    front["fit"] = "pad" if ratio == "pad" else plain
    if ratio.startswith("anyres"):
        front["tiling"] = {
            "pinpoints": _pinpoints(values.get("image_grid_pinpoints"), tower.image_size, where),
            "axes": "wh",
        }
        front["several"] = "tile" if most is None else "pad"
    media: dict[str, Any] = {"image": {"merge": merge}}
    fronts: dict[str, Any] = {"image": front}
    video = _video(values, most is not None, where)
    if video is not None:
        media["video"] = video
        frames = {**front, "fit": plain, "tiling": None, "several": "single"}
        number = int(values.get("frames_upbound") or 32)
        fronts["video"] = {"type": "video", "placeholder": None, "frames": number, "image": frames}
    return media, fronts


def _video(values: Mapping[str, Any], onevision: bool, where: str) -> dict[str, Any] | None:
    """The stream of clips, for checkpoints that say how they pool them."""
    stride = int(values.get("mm_spatial_pool_stride") or 2)
    mode = values.get("mm_spatial_pool_mode") or "bilinear"
    if values.get("mm_resampler_type") == "spatial_pool":  # LLaVA-NeXT-Video of April 2024 pools before the projector
        return {
            "pool": {"mode": mode, "stride": stride},
            "pool_at": "before",
            "merge": {"type": "frames", "newline": "none"},
        }
    if not onevision and "mm_newline_position" not in values:
        return None
    newline = values.get("mm_newline_position") or "one_token"
    if newline not in NEWLINES:
        raise CheckpointError(
            f"{where}: mm_newline_position {newline!r} is not supported; {nearest(newline, NEWLINES)}"
        )
    return {
        "pool": {"mode": mode, "stride": 2},  # the reference pools by 2 whatever mm_spatial_pool_stride says
        "pool_at": "after",
        "merge": {"type": "frames", "newline": NEWLINES[newline]},
    }


def _pinpoints(value: Any, size: int, where: str) -> list[list[int]]:
    """A list of pairs, such a list as a string, or a range of grids as a string."""
    if isinstance(value, str) and "x" in value:
        return [list(pair) for pair in pinpoints(value, size)]
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return [[int(a), int(b)] for a, b in pairs]
    except (ValueError, SyntaxError, TypeError):
        raise CheckpointError(f"{where}: image_grid_pinpoints {json.dumps(value)} is no list of pairs") from None


def _template(values: Mapping[str, Any], tokenizer: Tokenizer, kind: str, options: Options) -> Any:
    """The prompt. LLaVA's folders carry none: it follows from the control tokens, unless the caller says."""
    if options.template is not None:
        chosen = options.template
    elif tokenizer.id_of("<|start_header_id|>") is not None:
        chosen = "llava_llama_3"
    elif tokenizer.id_of("<|im_start|>") is not None:
        chosen = "qwen_1_5" if kind == "qwen2" else "chatml_direct"
    else:
        chosen = "mistral_instruct" if kind == "mistral" else "vicuna_v1"
    if values.get("mm_use_im_start_end"):
        from chiasm.processing.processor import ProcessingConfig

        template = ProcessingConfig(template=chosen).template
        return template.edit(media_wrap=["<im_start>", "<im_end>"])
    return chosen
