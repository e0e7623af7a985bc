"""Checkpoints in the layout of LAVIS: BLIP-2 in both stages, InstructBLIP.

Reference: salesforce/LAVIS 506965b, ``blip2_qformer.py``, ``blip2_opt.py``, ``blip2_t5.py``,
``blip2_vicuna_instruct.py``; towers ``eva_vit.py``, ``clip_vit.py``. A file is a pickle ``{"model": {name: tensor}}``
(or the same names in safetensors) and says nothing about its model, so it is read into one that a preset or a
configuration has built::

    vlm = chiasm.build(chiasm.preset("blip2-opt-2.7b"), tokenizer=OPT)
    lavis.load(vlm, "blip2_pretrained_opt2.7b.pth", allow_pickle=True)
    vlm.export("out", format="lavis")                              # out/model.pth

LAVIS saves what it trains: a frozen tower or language model need not be in the file, and is then loaded by itself
(``vlm.load_part``). What is in a file is read whole and strictly.

Differences by design: a stage-2 file does not fill a model that reads text (LAVIS loads what fits and leaves the text
half random); the bias of keys, which LAVIS does not have, is 0, and is left out in writing: it changes no attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.connectors.qformer import QFormer
from chiasm.convert import maps_blip, maps_towers
from chiasm.convert.engine import export_tensors, load_weights
from chiasm.convert.io import Weights, open_weights
from chiasm.convert.rules import AnyRule, Tied, prefixed, rename
from chiasm.encoders.vit import ViT
from chiasm.errors import CheckpointError
from chiasm.fusion.query_text import QueryText
from chiasm.fusion.splice import Splice
from chiasm.presets.checkpoint import Checkpoint, Options, Reader
from chiasm.presets.hf_parts import write_lm
from chiasm.registry import register

READ = {"select": "cls_patch", "post_norm": "applied", "layer": -1}  # of both towers
EVA = {"pre_norm": False, "patch_bias": True, "activation": "gelu"}
CLIP = {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu"}
HEADS = ("image_proj.", "text_proj.", "matcher.", "temperature", "words.")
KINDS = {"opt": "opt", "t5": "t5"}  # transformers' model_type → how LAVIS calls it; any Llama is "llm"


def load(vlm: Any, path: str | Path, allow_pickle: bool = False) -> list[str]:
    """Fill ``vlm`` from a file of LAVIS; gives the parts that the file does not hold, which stay as they are.

    Raises CheckpointError where the model has no place in LAVIS, or the file is not whole.
    """
    config, weights = vlm.config.model, open_weights(path, allow_pickle)
    every = rules(config)
    wanted, left = ["connectors.image.queries", "connectors.image.body.", "encoders.image.post_norm."], []
    groups = {"encoders.image": ("visual_encoder.", "encoders.image.")}
    if isinstance(config, QueryText.Config):
        wanted += HEADS
    else:
        kind = kind_of(config)
        groups |= {
            "lm": (f"{kind}_model.", "lm."),
            "connectors.image.proj": (f"{kind}_proj.", "connectors.image.proj."),
        }
    for part, (theirs, ours) in groups.items():
        if any(name.startswith(theirs) for name in weights.info):
            wanted.append(ours)
        else:
            left.append(part)
    _check_text(config, weights)
    plan = load_weights(vlm.model, weights, every, part=tuple(wanted))
    dropped = [f"{len(plan.dropped)} tensors of LAVIS left out"] if plan.dropped else []
    provenance = vlm.config.provenance.add(f"read from {path} (LAVIS)", *dropped, base={"connectors.image": str(path)})
    vlm.config = vlm.config.model_copy(update={"provenance": provenance})
    return left


def rules(config: Any) -> list[AnyRule]:
    """The weight rules of a model. Raises CheckpointError that names what LAVIS has no place for."""
    bridge, tower = _parts(config)
    first = isinstance(config, QueryText.Config)
    ours = "encoders.image."
    clip = [
        *maps_towers.clip_openai_vit("visual_encoder.", ours),
        rename("ln_vision.{leaf}", ours + "post_norm.{leaf}"),
    ]
    found = [
        *(clip if tower.pre_norm else maps_blip.lavis_tower("encoders.image", tower.dim)),
        *maps_blip.lavis_qformer("connectors.image", bridge.text is not None),
        *maps_blip.lavis_heads(first),
    ]
    if first:
        return found
    kind = kind_of(config)
    return [
        *found,
        rename(kind + "_proj.{leaf}", "connectors.image.proj.{leaf}"),
        *prefixed(write_lm(config.lm)[1], f"{kind}_model.", "lm."),
    ]


def clip_tower() -> list[AnyRule]:
    """LAVIS's CLIP and the norm that it keeps beside it."""
    norm = rename("ln_vision.{leaf}", "encoders.image.post_norm.{leaf}")
    return [*maps_towers.clip_openai_vit("visual_encoder.", "encoders.image."), norm]


def kind_of(config: Any) -> str:
    """How LAVIS calls the language model of a configuration. Raises CheckpointError."""
    kind = write_lm(config.lm)[0].get("model_type", "")
    if kind not in KINDS and kind != "llama":
        raise CheckpointError(f"LAVIS has BLIP-2 with OPT, T5 and Llama; this language model is {kind!r}")
    return KINDS.get(kind, "llm")


def _parts(config: Any) -> tuple[QFormer.Config, ViT.Config]:
    if not isinstance(config, (Splice.Config, QueryText.Config)):
        raise CheckpointError(f"LAVIS has no model joined as {config.type!r}; it has BLIP-2 and InstructBLIP")
    lost = [
        f"{room} {sorted(parts)} (it has 'image')"
        for room, parts in (("encoders", config.encoders), ("connectors", config.connectors))
        if set(parts) != {"image"}
    ]
    bridge, tower = config.connectors.get("image"), config.encoders.get("image")
    if not isinstance(bridge, QFormer.Config):
        lost.append(f"a connector of type {getattr(bridge, 'type', None)!r} (it has 'qformer')")
    if not isinstance(tower, ViT.Config) or not any(
        all(getattr(tower, key) == value for key, value in (READ | kind).items()) for kind in (EVA, CLIP)
    ):
        lost.append("this tower (it has EVA-CLIP, eva_clip_vit_g14, and CLIP's ViT-L, blip2_clip.clip_l)")
    if isinstance(config, QueryText.Config) and (not config.writes or config.temperature is not None):
        lost.append("a first stage without a head for words or a learned temperature")
    if lost:
        raise CheckpointError(f"LAVIS has no place for {'; '.join(lost)}")
    assert isinstance(bridge, QFormer.Config) and isinstance(tower, ViT.Config)
    return bridge, tower


def _check_text(config: Any, weights: Weights) -> None:
    if config.connectors["image"].text is not None and maps_blip.WORDS not in weights.info:
        raise CheckpointError(
            f"{weights.origin} holds no text half of the query transformer, which this model reads with: the second "
            "stage of BLIP-2 drops it, and a random one would read nothing. Load the first stage's checkpoint (LAVIS: "
            "blip2_pretrained.pth), or build a model whose connector has no 'text'"
        )


@register("checkpoint", "lavis")
class Lavis(Reader):
    """Writes LAVIS's file. Its files carry no configuration, so none is recognised: see ``load``."""

    name = "lavis"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Never: a file of LAVIS does not say what it is."""
        return False

    def read(self, folder: Path, values: Mapping[str, Any], options: Options) -> Checkpoint:
        """Not by a folder. Raises CheckpointError."""
        raise CheckpointError(f"{folder}: a file of LAVIS is read by chiasm.presets.lavis.load into a built model")

    def write(self, folder: Path, vlm: Any, max_shard: int) -> None:
        """``model.pth`` with every tensor, frozen parts too, as one pickle: LAVIS reads nothing else."""
        every = rules(vlm.config.model)
        tensors: dict[str, Tensor] = export_tensors(vlm.state_dict(), every)
        for rule in every:
            if isinstance(rule, Tied) and rule.twin in tensors:
                tensors[rule.theirs] = tensors[rule.twin]
        torch.save({"model": {name: t.detach().cpu().clone() for name, t in tensors.items()}}, folder / "model.pth")
