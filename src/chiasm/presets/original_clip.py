"""CLIP in its authors' layout and in open_clip's.

Reference: ``build_model`` of openai/CLIP d05afc4, which infers every size from the tensors; ``model.py`` and
``transform.py`` of open_clip 89fb801 with ``open_clip_config.json``.

OpenAI's file is a TorchScript archive: a program with its weights, which is never run. Its state dict, saved as
safetensors beside ``bpe_simple_vocab_16e6.txt.gz``, is read; three integers in it (``input_resolution`` and two more)
tell it from a file of open_clip, whose tensors are called the same but whose GELU may be another: those need their
``open_clip_config.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chiasm.config import diff
from chiasm.convert import maps_towers
from chiasm.convert.engine import export_tensors
from chiasm.convert.io import Loaded, Weights, open_weights, write_json, write_weights
from chiasm.convert.rules import AnyRule
from chiasm.errors import CheckpointError
from chiasm.fusion.dual_tower import DualTower
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import Provenance, VLMConfig
from chiasm.presets.checkpoint import OPEN_CLIP, TENSORS, Checkpoint, Options, Reader, check_vocab
from chiasm.processing.image import CLIP_MEAN, CLIP_STD, ImageFrontEnd
from chiasm.registry import register

MARKS = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's files, never in open_clip's
HEAD = 64  # width of a head in every tower of OpenAI


@register("checkpoint", "openai_clip")
class OpenAIClip(Reader):
    """The state dict of OpenAI's ``CLIP``, without a configuration."""

    name = "openai_clip"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By the names of the tensors, where the folder has no configuration."""
        return {"visual.conv1.weight", "token_embedding.weight"} <= set(values.get(TENSORS, ()))

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, weights = str(folder), open_weights(folder, options.allow_pickle)
        if not weights.info.keys() >= MARKS:
            raise CheckpointError(
                f"{where}: the tensors are those of a CLIP, but nothing says which GELU it was trained with: OpenAI's "
                f"own files hold {', '.join(sorted(MARKS))}, this one does not; put open_clip_config.json beside it"
            )
        config = inferred(weights)
        rules = maps_towers.clip_openai_resnet() if "visual.attnpool.positional_embedding" in weights.info else None
        return _checkpoint(folder, config, picture(config["image_size"]), weights, rules, options)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """``model.safetensors`` with OpenAI's names and its three integers, and the tokenizer. See the contract."""
        model = vlm.config.model
        tensors = _exported(vlm)
        text, size = model.encoders["text"], model.encoders["image"].image_size
        numbers = {"input_resolution": size, "context_length": text.positions, "vocab_size": text.vocab}
        tensors |= {name: torch.tensor(number) for name, number in numbers.items()}
        _same(model, inferred(Loaded("export", tensors)), "OpenAI's layout, which tells sizes by shapes alone,")
        _same_pictures(vlm, picture(size), "OpenAI's transform")
        vlm.processor.tokenizer.save(folder)
        write_weights(folder, tensors, max_shard)


@register("checkpoint", "open_clip")
class OpenClip(Reader):
    """A folder with ``open_clip_config.json``: CLIP with a vision transformer or a residual network of open_clip."""

    name = "open_clip"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By ``model_cfg``, which only that table has."""
        return "model_cfg" in values

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """See the contract."""
        where, weights = str(folder), open_weights(folder, options.allow_pickle)
        config = configured(values["model_cfg"], where)
        prepared = values.get("preprocess_cfg") or {}
        front = picture(config["image_size"], prepared, where)
        rules = maps_towers.clip_openai_resnet() if config["encoders"]["image"]["type"] == "resnet" else None
        return _checkpoint(folder, config, front, weights, rules, options)

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """``open_clip_config.json``, ``open_clip_model.safetensors`` and the tokenizer. See the contract."""
        tensors, table = _exported(vlm), written(vlm.config.model)
        _same(vlm.config.model, configured(table, "export"), "open_clip_config.json")
        front = vlm.processor.config.media["image"]
        prepared = {
            "size": front.size,
            "mode": "RGB",
            "mean": list(front.mean),
            "std": list(front.std),
            "interpolation": front.resample,
            "resize_mode": {"crop": "shortest"}.get(front.fit, front.fit),
        }
        _same_pictures(vlm, picture(front.size, prepared, "export"), "open_clip's transform")
        vlm.processor.tokenizer.save(folder)
        names = write_weights(folder, tensors, sys.maxsize)  # open_clip reads one file
        (folder / names[0]).rename(folder / "open_clip_model.safetensors")
        write_json(folder / OPEN_CLIP, {"model_cfg": table, "preprocess_cfg": prepared})


def _exported(vlm: Any) -> dict[str, Any]:
    """The tensors under OpenAI's names. Raises CheckpointError for a model that is no CLIP."""
    model = vlm.config.model
    if not isinstance(model, DualTower.Config) or model.encoders["text"].type != "text":
        raise CheckpointError(f"export: this layout holds a CLIP, this is a model of type {model.type!r}")
    resnet = model.encoders["image"].type == "resnet"
    rules = maps_towers.clip_openai_resnet() if resnet else maps_towers.clip_openai()
    return export_tensors(vlm.state_dict(), rules)


def _same(model: DualTower.Config, found: dict[str, Any], what: str) -> None:
    """Raises CheckpointError that names where a model and what a layout says of it differ."""
    read = DualTower.Config.parse({k: v for k, v in found.items() if k != "image_size"})
    lost = {key: pair for key, pair in diff(model, read).items() if key not in ("scale_init", "bias_init")}
    if lost:
        told = ", ".join(f"{key} is {a!r}, {b!r} there" for key, (a, b) in list(lost.items())[:4])
        raise CheckpointError(f"export: {what} has no counterpart of this model: {told}")


def _same_pictures(vlm: Any, front: dict[str, Any], what: str) -> None:
    lost = diff(vlm.processor.config.media["image"], ImageFrontEnd.Config.parse(front))
    lost.pop("placeholder", None)
    if lost:
        told = ", ".join(f"{key} is {a!r}, {b!r} there" for key, (a, b) in list(lost.items())[:4])
        raise CheckpointError(f"export: {what} makes other pixels: {told}")


def _checkpoint(
    folder: Path,
    config: dict[str, Any],
    front: dict[str, Any],
    weights: Weights,
    rules: list[AnyRule] | None,
    options: Options,
) -> Checkpoint:
    where, tokenizer = str(folder), Tokenizer.from_folder(folder)
    model = {key: value for key, value in config.items() if key != "image_size"}
    text = config["encoders"]["text"]
    if list(tokenizer.suffix) != [text["vocab"] - 1]:
        raise CheckpointError(
            f"{where}: its tokenizer ends a text with ids {list(tokenizer.suffix)}, but the model pools at its largest "
            f"id, {text['vocab'] - 1}; tokenizer and model belong to different checkpoints"
        )
    parsed = VLMConfig.parse(
        {
            "model": {"type": "dual_tower", **model},
            "processing": {
                "template": options.template or {"type": "pair", "length": text["positions"], "clean": "clip"},
                "media": {"image": front},
            },
            "provenance": Provenance(base={"all": where}),
        },
        where=where,
    )
    check_vocab(parsed, tokenizer, where)
    return Checkpoint(parsed, weights, rules or maps_towers.clip_openai(), folder)


# ------------------------------------------------------------------------------------------------------------- OpenAI


def inferred(weights: Weights) -> dict[str, Any]:
    """The network and picture size of OpenAI's state dict, from the shapes of its tensors."""
    shapes = {name: info.shape for name, info in weights.info.items()}
    vocab, width = shapes["token_embedding.weight"]
    text = _text(vocab, width, _blocks(shapes, "transformer.resblocks."), shapes["positional_embedding"][0])
    dim = shapes["text_projection"][1]
    if "visual.attnpool.positional_embedding" in shapes:
        first = shapes["visual.layer1.0.conv1.weight"][0]
        side = round((shapes["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
        return _resnet([_blocks(shapes, f"visual.layer{n}.") for n in (1, 2, 3, 4)], first, side * 32, dim, text)
    inner, _, patch, _ = shapes["visual.conv1.weight"]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5) * patch
    tower = _vit(side, patch, inner, _blocks(shapes, "visual.transformer.resblocks."), inner // HEAD, 4 * inner)
    return {
        "dim": dim,
        "encoders": {"image": tower, "text": text},
        "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
        "image_size": side,
    }


def _blocks(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _text(vocab: int, width: int, depth: int, positions: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab": vocab, "dim": width, "depth": depth, "heads": width // HEAD, "mlp": 4 * width}
    return {"type": "text", **sizes, "positions": positions, **more}


def _vit(size: int, patch: int, dim: int, depth: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    sizes = {"image_size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "mlp": mlp}
    kind = {"activation": "quick_gelu", "norm_eps": 1e-5, "patch_bias": False, "pre_norm": True, "select": "cls"}
    return {"type": "vit", **sizes, **kind, **more}


def _resnet(blocks: Any, width: int, size: int, dim: int, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "dim": dim,
        "encoders": {
            "image": {"type": "resnet", "image_size": size, "blocks": list(blocks), "width": width},
            "text": text,
        },
        "connectors": {
            "image": {"type": "clip_pool", "grid": [size // 32, size // 32], "heads": width * 32 // HEAD},
            "text": {"type": "pooled", "pool": "last"},
        },
        "image_size": size,
    }


# ---------------------------------------------------------------------------------------------------------- open_clip

_VISION: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
_WORDS: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
_PLAIN = {"timm_model_pretrained", "hf_tokenizer_name", "tokenizer_kwargs", "output_tokens", "patch_dropout"}


def configured(c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The network and picture size of ``model_cfg``. Raises CheckpointError for what is not expressed here."""
    vision, text = _VISION | dict(c.get("vision_cfg", {})), _WORDS | dict(c.get("text_cfg", {}))
    extra = (vision.keys() - _VISION.keys()) | (text.keys() - _WORDS.keys())
    extra = {key for key in extra - _PLAIN if vision.get(key) or text.get(key)}
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
    lost = sorted(extra | {key for key in c.keys() - known if c[key]})
    if lost:
        raise CheckpointError(
            f"{where}: open_clip_config.json sets {', '.join(lost)}, which this reader does not express; save the "
            "model in the layout of transformers, or build it from parts"
        )
    activation = "quick_gelu" if c.get("quick_gelu") else "gelu"
    ratio = text["mlp_ratio"]
    words = _text(text["vocab_size"], text["width"], text["layers"], text["context_length"], activation=activation)
    words |= {"heads": text["heads"], "mlp": int(text["width"] * ratio)}
    size, width = vision["image_size"], vision["width"]
    if isinstance(vision["layers"], list):
        found = _resnet(vision["layers"], width, size, c["embed_dim"], words)
    else:
        heads, mlp = width // vision["head_width"], int(width * vision["mlp_ratio"])
        tower = _vit(size, vision["patch_size"], width, vision["layers"], heads, mlp, activation=activation)
        found = {
            "dim": c["embed_dim"],
            "encoders": {"image": tower, "text": words},
            "connectors": {"image": {"type": "pooled"}, "text": {"type": "pooled", "pool": "last"}},
            "image_size": size,
        }
    if c.get("init_logit_bias") is not None:
        found |= {"bias_init": float(c["init_logit_bias"]), "max_scale": None}
    return found


def written(model: DualTower.Config) -> dict[str, Any]:
    """``model_cfg`` of a CLIP."""
    tower, text = model.encoders["image"], model.encoders["text"]
    if tower.type == "resnet":
        vision: dict[str, Any] = {"layers": list(tower.blocks), "width": tower.width, "patch_size": None}
    else:
        vision = {"layers": tower.depth, "width": tower.dim, "patch_size": getattr(tower, "patch", 0)}
        vision |= {"head_width": tower.dim // tower.heads, "mlp_ratio": _ratio(tower.mlp, tower.dim)}
    words = {"context_length": text.positions, "vocab_size": text.vocab, "width": text.dim, "heads": text.heads}
    words |= {"layers": text.depth, "mlp_ratio": _ratio(text.mlp, text.dim)}
    table = {"embed_dim": model.dim, "vision_cfg": {"image_size": tower.image_size, **vision}, "text_cfg": words}
    if text.activation == "quick_gelu":
        table["quick_gelu"] = True
    return table if model.bias_init is None else table | {"init_logit_bias": model.bias_init}


def _ratio(mlp: int, width: int) -> float:
    """A factor that ``int(width · factor)`` makes ``mlp`` of."""
    ratio = mlp / width
    return ratio if int(width * ratio) == mlp else (mlp + 0.5) / width


def picture(size: int, c: Mapping[str, Any] | None = None, where: str = "") -> dict[str, Any]:
    """The picture front end of OpenAI, changed by ``preprocess_cfg``. Raises CheckpointError.

    As theirs but for one thing: a palette or transparent picture is made RGB before it is resized, not after.
    """
    c = dict(c or {})
    given = c.get("size", size)
    side = given if isinstance(given, int) else given[-1]
    fits = {"shortest": "crop", "squash": "squash"}
    fit = fits.get(c.get("resize_mode", "shortest"))
    if fit is None or (not isinstance(given, int) and len(set(given[-2:])) > 1) or side != size:
        raise CheckpointError(
            f"{where}: preprocess_cfg has resize_mode={c.get('resize_mode')!r} and size={given}, the tower reads "
            f"{size}x{size}; known modes: {', '.join(fits)}"
        )
    return {
        "type": "image",
        "placeholder": None,
        "size": size,
        "fit": fit,
        "crop_rounding": "round",
        "resample": c.get("interpolation", "bicubic"),
        "mean": c.get("mean", CLIP_MEAN),
        "std": c.get("std", CLIP_STD),
    }


__all__ = ["OPEN_CLIP", "OpenAIClip", "OpenClip", "configured", "inferred", "picture"]
